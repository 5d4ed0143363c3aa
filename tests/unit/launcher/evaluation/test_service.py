"""Checkpoints are judged one after the other, whatever happens to one: the service alone, without ranks."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.evaluation.battery import Battery
from launcher.evaluation.contamination import TaskOverlap
from launcher.evaluation.finding import load_tasks
from launcher.evaluation.judge import Judge
from launcher.evaluation.own_ranks import OwnRanksService
from launcher.evaluation.tokens import FolderTokenizer
from launcher.evaluation.training_ranks import TrainingRanksService
from launcher.job.fleet import Fleet
from launcher.placement import Placement
from made_tasks import write_task
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest, fingerprint
from trainer.events import Event, EventLog, read_events
from trainer.inference.requests import Answer, Score, Scored, requests_fingerprint, write_answers, write_requests
from trainer.run_dir import RunDir


class ArrivingFleet:
    """Of machines that do not come up before the test is over."""

    where = Placement(nodes=1, ranks_per_node=1, gpus_per_node=0)

    def news(self) -> list[Any]:
        return []

    def present(self) -> list[Any]:
        return []


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.checkpoints.mkdir(parents=True)
    return run_dir


@pytest.fixture
def log(run_dir: RunDir) -> Iterator[EventLog]:
    log = EventLog(run_dir.events_path)
    yield log
    log.close()


@pytest.fixture
def judge(tmp_path: Path, tokenizer: FolderTokenizer) -> Judge:
    return judge_by(tmp_path, tokenizer, "brown fox", "lazy dog")


def judge_by(folder: Path, tokenizer: FolderTokenizer, *choices: str) -> Judge:
    """Of one question with these choices."""
    records = [{"question": "the quick", "options": choices, "label": 0}]
    task = write_task(folder, records, kind="multiple_choice", prompt="{question}", choices="options")
    return Judge(Battery.of(load_tasks([str(task)]), tokenizer, 64), "fp32")


def commit(run_dir: RunDir, step: int) -> None:
    temporary = store.begin(run_dir.checkpoints, step)
    (temporary / "weights").write_bytes(b"weights")
    files = {"weights": fingerprint(temporary / "weights")}
    store.commit(temporary, replace(Manifest(step, step, {}), files=files))


def answered(run_dir: RunDir, judge: Judge, step: int) -> None:
    """By training ranks."""
    run_dir.evaluation.mkdir(exist_ok=True)
    answers: list[Answer] = []
    for request in judge.requests:
        assert isinstance(request, Score)
        answers.append(Scored((-1.0,) * len(request.continuation), is_greedy=False))
    write_requests(asked := run_dir.path / "asked.jsonl", judge.requests)
    write_answers(run_dir.answers_path(step, requests_fingerprint(asked)), answers)


def of_kind(run_dir: RunDir, *kinds: str) -> list[Event]:
    return [event for event in read_events(run_dir.events_path) if event["kind"] in kinds]


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class BrokenFleet(ArrivingFleet):
    """Of which only a disk that is away hears."""

    def present(self) -> list[Any]:
        raise OSError("the disk is away")


def test_checkpoints_are_not_lost_in_silence_where_all_fails(run_dir: RunDir, log: EventLog, judge: Judge) -> None:
    for step in range(1, 9):
        commit(run_dir, step)
    with OwnRanksService(run_dir, judge, log.write, cast(Fleet, BrokenFleet()), "queue") as service:
        service.finish()
    failed = of_kind(run_dir, "evaluation_failed")
    assert [event["step"] for event in failed] == [1, 2, 3, 4, 5]
    assert "the disk is away" in failed[0]["reason"]
    assert "nothing more is judged" in failed[-1]["reason"]
    assert [event["step"] for event in of_kind(run_dir, "evaluation_skipped")] == [6, 7, 8]


def test_what_is_under_way_is_given_up_where_the_run_goes_back(run_dir: RunDir, log: EventLog, judge: Judge) -> None:
    fleet = cast(Fleet, ArrivingFleet())
    with OwnRanksService(run_dir, judge, log.write, fleet, "queue") as service:
        commit(run_dir, 20)
        log.write("checkpoint_saved", step=20)
        until(lambda: service._work is not None)
        log.write("rolled_back", from_step=25, to_step=10, reason="loss spike")
        service.finish()
    (skipped,) = of_kind(run_dir, "evaluation_skipped", "evaluation_failed")
    assert (skipped["kind"], skipped["step"]) == ("evaluation_skipped", 20) and "step 10" in skipped["reason"]


def test_a_search_for_overlaps_keeps_no_command_from_beginning_or_ending(
    run_dir: RunDir, log: EventLog, judge: Judge
) -> None:
    """It reads all training text, of which a command before has left the answers to one checkpoint."""
    is_searching, is_over = threading.Event(), threading.Event()

    def find_overlaps() -> Mapping[str, TaskOverlap]:
        is_searching.set()
        is_over.wait(10)
        return {}

    commit(run_dir, 1)
    answered(run_dir, judge, 1)
    searching = TrainingRanksService(run_dir, Judge(judge.battery, "fp32", find_overlaps), log.write, end_seconds=0.1)
    with searching:
        until(is_searching.is_set)
    assert not is_over.is_set() and searching._thread.is_alive()
    is_over.set()
    searching._thread.join()
    assert not of_kind(run_dir, "checkpoint_evaluated")  # the record may be closed by then
    with TrainingRanksService(run_dir, judge, log.write) as again:
        again.finish()
    assert [event["step"] for event in of_kind(run_dir, "checkpoint_evaluated")] == [1]


def test_answers_to_other_tasks_are_not_graded(
    run_dir: RunDir, log: EventLog, tmp_path: Path, tokenizer: FolderTokenizer, judge: Judge
) -> None:
    """A command left them, and the tasks were changed before the next one."""
    with TrainingRanksService(run_dir, judge, log.write):
        pass
    commit(run_dir, 1)
    answered(run_dir, judge, 1)
    other = judge_by(tmp_path, tokenizer, "fox jumps", "the dog")
    assert len(other.requests) == len(judge.requests)
    for _ in range(2):  # nor by a third
        with TrainingRanksService(run_dir, other, log.write) as service:
            service.finish()
    assert not of_kind(run_dir, "checkpoint_evaluated")


def test_answers_whose_checkpoint_is_gone_are_recorded_and_none_is_kept(
    run_dir: RunDir, log: EventLog, judge: Judge
) -> None:
    commit(run_dir, 2)
    for step in (1, 2):
        answered(run_dir, judge, step)
    for _ in range(2):
        with TrainingRanksService(run_dir, judge, log.write) as service:
            service.finish()
    assert [event["step"] for event in of_kind(run_dir, "evaluation_skipped")] == [1]
    assert [event["step"] for event in of_kind(run_dir, "checkpoint_evaluated")] == [2]
    assert not list(run_dir.evaluation.glob("*.answers.jsonl"))
