"""Another process reads how far a task has come, whenever it looks."""

from pathlib import Path

from trainer.progress import ProgressFile, counting


def test_whoever_looks_reads_what_was_written_last(tmp_path: Path) -> None:
    seen: list[tuple[object, ...]] = []
    advance = counting(lambda *progress: seen.append(progress), "evaluate", "micro-batches")
    writer, reader = ProgressFile(tmp_path / "heldout.json"), ProgressFile(tmp_path / "heldout.json")
    reader.tell(advance)
    assert not seen
    writer.write(1, 12)
    reader.tell(advance)
    writer.write(2, 12)
    writer.write(3, 12)
    reader.tell(advance)
    assert seen == [("evaluate", 1, 12, "micro-batches"), ("evaluate", 3, 12, "micro-batches")]
    assert not (tmp_path / "heldout.json").exists()
