"""How a run is, by its folder alone."""

import io
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from launcher.report import status as report
from launcher.report.display import Display
from launcher.verbs import runs
from trainer.config import UserError
from trainer.config_file import from_tree
from trainer.events import EventLog
from trainer.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Of a run that was killed in its fifth step, after a rank had died in the third; an event every two seconds."""
    seconds = count(1000, 2)
    monkeypatch.setattr("trainer.events.time.time", lambda: float(next(seconds)))
    config = from_tree({"name": "lion", "train": {"total_tokens": 10 * 256 * 2048}})
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config)
    log = EventLog(run_dir.events_path)
    log.write("stage_started", stage="train")
    for number, steps in ((1, (1, 2)), (2, (2, 3, 4))):
        log.write("life_started", number=number, nodes=1, data=1, why="")
        log.write("training_started", step=number - 1, ranks=4, device="NVIDIA H100", tier="disk")
        for step in steps:
            fields = {"tokens": step * 256 * 2048, "num_samples": 256, "loss": 5.0 - step, "grad_norm": 1.0, "lr": 0.1}
            log.write("step", step=step, seconds=2.0, phases={}, **fields)
        log.write("checkpoint_snapshot", step=number, durable=True, seconds=0.5)
        log.write("checkpoint_saved", step=number, bytes=7, seconds=1.0)
        if number == 1:
            log.write("life_failed", what="rank", error="rank 1 was killed \x1b[31m", machine="", step=2)
    log.write("ranks", step=4, seconds=[1.0, 1.5], group=1, min=1.0, mean=1.25, max=1.5, slowest=1)
    log.close()
    return run_dir


def test_the_status_of_a_run_is_what_its_record_says(run_dir: RunDir) -> None:
    found = runs.status(run_dir.path)
    assert (found.state, found.detail) == ("cut off", "in train; the same command goes on")
    assert (found.step, found.num_steps, found.loss, found.step_seconds) == (4, 10, 1.0, 2.0)
    assert (found.lives, found.failures, found.restarts, found.saved_step) == (2, 1, {"rank": 1}, 2)
    assert found.last_failure == "rank 1 was killed \x1b[31m"
    assert found.remaining_seconds == 12.0 and found.tokens_per_second == 256 * 2048 / 2
    assert found.mfu is not None and found.mfu > 0
    assert found.rank_seconds == {"min": 1.0, "mean": 1.25, "max": 1.5, "slowest": 1}
    assert (found.times["productive"], found.times["lost"], found.times["startup"]) == (8.0, 6.0, 4.0)
    assert found.goodput == 8.0 / sum(found.times.values())
    assert [each["kind"] for each in found.recent] == ["training_started", "life_failed", "training_started"]
    assert found.page is None


def test_an_observer_reads_on_where_it_was(run_dir: RunDir) -> None:
    observer = runs.Observer(run_dir.path)
    assert observer.status() == observer.status() == runs.status(run_dir.path)
    EventLog(run_dir.events_path).write("rolled_back", from_step=5, to_step=2, reason="loss spike", quarantined=[])
    assert observer.status().step == 2 and observer.status() == runs.status(run_dir.path)


def test_a_run_that_has_only_been_made_is_told_of_too(tmp_path: Path) -> None:
    RunDir(tmp_path).create(from_tree({"name": "cub"}))
    found = runs.status(tmp_path)
    assert (found.state, found.step, found.loss, found.goodput) == ("not begun", 0, None, None)
    assert next(report.lines_of(found)) == "state       not begun"


def test_one_screen_says_it_to_a_person(run_dir: RunDir) -> None:
    stream = io.StringIO()
    report.show(runs.status(run_dir.path), Display(Console(file=stream, width=200)))
    lines = dict(line.split(None, 1) for line in stream.getvalue().splitlines())
    assert lines["state"] == "cut off (in train; the same command goes on)"
    assert lines["step"] == "4 of 10 (40.0%), 12 s left"
    assert lines["loss"] == "1.0000"
    assert lines["speed"].startswith("2 s a step, 262,144 tokens/s, MFU ")
    assert lines["checkpoint"] == "step 2 is the newest; 2 saved"
    assert lines["failed"] == "1 times; the last one: rank 1 was killed \\x1b[31m"
    assert len(stream.getvalue().splitlines()) <= 12


@pytest.mark.parametrize("is_terminal", [False, True])
def test_watching_ends_with_the_command(run_dir: RunDir, is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.time, "sleep", lambda seconds: looks.append(seconds))
    looks: list[float] = []
    ended = runs.status(run_dir.path)

    def look() -> runs.Status:
        return replace(ended, state="working", step=len(looks)) if len(looks) < 3 else ended

    stream = io.StringIO()
    report.watch(look, "runs/[b]lion", Display(Console(file=stream, force_terminal=is_terminal, width=120)))
    assert looks == [1.0] * 3 and "cut off" in stream.getvalue()
    assert ("runs/[b]lion" in stream.getvalue()) == is_terminal


def test_events_are_chosen_by_kind_and_time(run_dir: RunDir) -> None:
    every = list(runs.events(run_dir.path, None, ()))
    assert len(every) == 16
    assert [each["kind"] for each in runs.events(run_dir.path, None, ["ranks", "life_failed"])] == [
        *("life_failed", "ranks"),
    ]
    assert list(runs.events(run_dir.path, every[-1]["time"] + 1, ())) == []
    assert list(runs.events(run_dir.path, every[0]["time"], ())) == every
    with pytest.raises(UserError, match=r"--kind steps: there is no such kind of event; known: .*step_skipped"):
        list(runs.events(run_dir.path, None, ["steps"]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3725, "1 h 2 min"), (90000, "1 d 1 h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text
