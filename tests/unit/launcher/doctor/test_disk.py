"""The disk of the run's folder."""

import errno
import os
from pathlib import Path

import pytest

from launcher import memory
from launcher.doctor.checks.disk import Disk, judge, measure
from launcher.doctor.finding import fail
from launcher.doctor.guard import Check, outcome
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

GB = 10**9


def config(nodes: int = 1) -> RunConfig:
    return from_tree({"preset": "gpt2_small", "parallel": {"data": nodes}, "launch": {"nodes": nodes}})


def disk(free_bytes: float = 100 * GB, write: float = 1e9) -> Disk:
    return Disk("runs/a", int(free_bytes), write, 2e9)


def test_the_checkpoints_that_are_kept_must_fit_with_the_one_being_written() -> None:
    size = memory.checkpoint_bytes(config())
    assert judge(disk(free_bytes=3.1 * size), config()).verdict == "ok"
    found = judge(disk(free_bytes=2.9 * size), config())
    assert found.verdict == "fail"
    assert found.measured.endswith("a checkpoint takes 1.5 GB and 1.5 s, and 3 of them must fit (4.5 GB)")
    assert found.fix == "make room, lower checkpoint.keep_last, or use another --run-dir"


def test_a_checkpoint_must_be_written_in_the_time_of_a_preemption() -> None:
    """1.5 GB in 60 s; machines write their shares at once."""
    assert judge(disk(write=26e6), config()).verdict == "ok"
    found = judge(disk(write=20e6), config())
    assert found.verdict == "warn" and "more than checkpoint.grace_seconds 60" in found.measured
    assert judge(disk(write=20e6), config(nodes=2)).verdict == "ok"


def test_without_a_config_it_is_measured_against_a_hard_disk() -> None:
    assert judge(disk(), None).verdict == "ok"
    assert judge(disk(write=50e6), None).verdict == "warn"
    assert judge(disk(free_bytes=GB), None).verdict == "warn"


def test_a_disk_is_written_and_read_and_nothing_is_left(tmp_path: Path) -> None:
    found = measure(tmp_path / "runs" / "a", num_bytes=32 << 20)
    assert found.folder == str(tmp_path / "runs" / "a")
    assert found.write_bytes_per_second > 0 and found.read_bytes_per_second > 0 and found.free_bytes > 0
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_gets_less_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    monkeypatch.setattr(os, "fdatasync", pieces.append)
    measure(tmp_path, num_bytes=1 << 40, seconds=0.0001)
    assert len(pieces) == 1


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    in_the_way = outcome(Check("disk", 10.0, lambda: judge(measure(tmp_path / "file" / "run"), None), ""))
    assert in_the_way.verdict == "fail" and in_the_way.measured == f"{tmp_path}/file is no folder"

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert outcome(Check("disk", 10.0, lambda: judge(measure(tmp_path), None), "")) == fail(
        "disk",
        f"{tmp_path}: nothing can be written there (No space left on device)",
        "make room, make it writable, or use another --run-dir",
    )


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder; move it"):
        measure(tmp_path / "file")
