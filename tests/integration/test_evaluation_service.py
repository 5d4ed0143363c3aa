"""Checkpoints are judged beside training, whatever happens to them and to those who judge."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from launcher.cli.main import main
from made_tasks import write_task
from small_run import NUM_STEPS, broadgauge, write_config
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.format.results import read_results, results_path
from trainer.events import Event, read_events
from trainer.run_dir import RunDir

CHOICES = [
    {"question": f"the model reads {word}", "options": ["a token", "its layers"], "label": number % 2}
    for number, word in enumerate(("and then", "while", "until", "which", "that", "with"))
]


def write_tasks(folder: Path, num_generated: int = 3) -> list[str]:
    folder.mkdir()
    measures = {"choices": "options", "metrics": ["accuracy", "answer_logprob"]}
    choosing = write_task(folder, CHOICES, name="choosing", kind="multiple_choice", prompt="{question}", **measures)
    asked = [{"question": f"token {number}", "answer": "layers"} for number in range(num_generated)]
    going_on = write_task(
        folder, asked, name="going_on", prompt="{question}", max_new_tokens=8, decoding={"beams": 2}, stop=[" a"]
    )
    return [str(choosing), str(going_on)]


def events_of(run_dir: Path, kind: str) -> list[Event]:
    path = RunDir(run_dir).events_path
    return [event for event in read_events(path) if event["kind"] == kind] if path.exists() else []


def write_judged(folder: Path, tasks: list[str], **evaluation: Any) -> Path:
    layout = {"where": "service", "when_behind": "queue", "tensor": 1, "pipeline": 1}
    return write_config(
        folder,
        model={"seq_length": 64},
        train={"total_tokens": NUM_STEPS * 16 * 64, "precision": "fp32"},
        evaluation={"tasks": tasks, **layout, **evaluation},
        checkpoint={"keep_last": 1, "keep_best": 1, "best_by": "choosing/0-shot/answer_logprob"},
    )


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """By a command in this process, which has imported what it needs."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    return orjson.loads(printed.out)


def test_every_checkpoint_is_judged_beside_training_as_its_export_is_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_dir = write_judged(tmp_path, write_tasks(tmp_path / "tasks")), tmp_path / "run"
    outcome = broadgauge("run", config, "--run-dir", run_dir)
    assert outcome.returncode == 0, outcome.stderr
    judged = events_of(run_dir, "checkpoint_evaluated")
    assert [event["step"] for event in judged] == [8, 16, 24]
    assert not events_of(run_dir, "evaluation_skipped") and not events_of(run_dir, "evaluation_failed")
    at_the_end = {event["step"]: event["loss"] for event in events_of(run_dir, "evaluated")}
    assert judged[-1]["heldout_loss"] == pytest.approx(at_the_end[NUM_STEPS], rel=1e-6)

    names = {"choosing/0-shot/accuracy", "choosing/0-shot/answer_logprob", "going_on/0-shot/exact_match"}
    assert all(event["scores"].keys() == names for event in judged)
    best = max(judged, key=lambda event: (event["scores"]["choosing/0-shot/answer_logprob"], event["step"]))["step"]
    assert set(store.steps(run_dir / "checkpoints")) >= {NUM_STEPS, best}
    last = run_dir / "checkpoints" / store.folder_name(NUM_STEPS)
    results = read_results(last, read_manifest(last))
    assert results is not None and results["scores"] == judged[-1]["scores"]

    listed = told(capsys, "results", run_dir, "--json", "--plot", tmp_path / "scores.png")
    assert [each["step"] for each in listed] == [8, 16, 24]  # removed ones too
    assert (tmp_path / "scores.png").stat().st_size > 1000

    tasks = [option for name in ("choosing", "going_on") for option in ("--tasks", tmp_path / "tasks" / f"{name}.yaml")]
    found, measured = told(capsys, "eval", run_dir / "export", *tasks), results["evaluation"]
    assert found["battery_fingerprint"] == measured["battery_fingerprint"]
    assert found["loss"] == pytest.approx(measured["heldout"]["loss"], abs=1e-4)
    assert found["bits_per_byte"] == pytest.approx(measured["heldout"]["bits_per_byte"], abs=1e-4)
    assert found["scores"] == pytest.approx(results["scores"], abs=1e-4)


@pytest.mark.slow
def test_what_befalls_one_checkpoint_keeps_no_other_from_being_judged(tmp_path: Path) -> None:
    """The first is deleted while it is evaluated, of the second a rank of the service is killed."""
    config, run_dir = write_judged(tmp_path, write_tasks(tmp_path / "tasks", num_generated=400)), tmp_path / "run"
    deeds = threading.Thread(target=disturb, args=(run_dir,))
    deeds.start()
    outcome = broadgauge("run", config, "--run-dir", run_dir, timeout_seconds=300)
    deeds.join()
    assert outcome.returncode == 0, outcome.stderr
    failed = {event["step"]: event["reason"] for event in events_of(run_dir, "evaluation_failed")}
    assert failed.keys() == {8, 16}
    assert "step-00000008" in failed[8] and "SIGKILL" in failed[16]
    assert [event["step"] for event in events_of(run_dir, "checkpoint_evaluated")] == [24]
    assert not events_of(run_dir, "life_failed")  # training has seen nothing of it
    assert outcome.stdout.count("could not be evaluated") == 2
    again = broadgauge("run", config, "--run-dir", run_dir)
    assert again.returncode == 0 and "nothing to do" in again.stdout

    results_path(run_dir / "checkpoints" / store.folder_name(24)).unlink()  # as if it had got its tasks after the end
    later = broadgauge("run", config, "--run-dir", run_dir, "--set", "evaluation.max_examples=3", timeout_seconds=300)
    assert later.returncode == 0, later.stderr
    judged = [event["step"] for event in events_of(run_dir, "checkpoint_evaluated")]
    assert judged.count(24) == 2 and judged[-1] == 24  # and what else was left


def disturb(run_dir: Path) -> None:
    heldout, answers = (run_dir / "evaluation" / name for name in ("heldout.json", "answers.jsonl.progress"))
    until(lambda: heldout.exists() and not events_of(run_dir, "evaluation_failed"))
    shutil.rmtree(run_dir / "checkpoints" / store.folder_name(8))
    until(lambda: any(event["step"] == 8 for event in events_of(run_dir, "evaluation_failed")))
    answers.unlink(missing_ok=True)
    until(answers.exists)
    (rank,) = ranks_of(run_dir / "evaluation")
    os.kill(rank, signal.SIGKILL)


def ranks_of(folder: Path) -> list[int]:
    """Processes of ranks whose output goes to logs of this folder."""
    logs, found = str((folder / "logs").resolve()), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_one = os.readlink(process / "fd" / "1").startswith(f"{logs}/rank-")
        except OSError:
            continue
        found += [int(process.name)] if is_one else []
    return found


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
