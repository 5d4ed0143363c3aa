"""A profile is of the steps and ranks that were asked for, and a request that cannot be met is taken away."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config_file import from_tree
from trainer.profiling import ProfileRequest, StepProfiler
from trainer.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(from_tree({"name": "lion"}))
    return run_dir


def train(run_dir: RunDir, rank: int, num_steps: int, heard_after: int = 1, first: int = 1) -> list[dict[str, Any]]:
    """What a rank records that multiplies matrices of step x step."""
    recorded: list[dict[str, Any]] = []
    record = lambda kind, **fields: recorded.append({"kind": kind, **fields})  # noqa: E731
    with StepProfiler(run_dir, rank, torch.device("cpu"), record) as profiler:
        for step in range(first, num_steps + 1):
            profiler.before(step)
            torch.ones(step, step) @ torch.ones(step, step)
            asked = profiler.is_asked()
            assert not (asked and rank)  # rank 0 looks, and the ranks agree
            profiler.after(step)
            if step == heard_after:
                profiler.hear(step)
    return recorded


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def test_a_trace_holds_the_steps_that_were_asked_for(run_dir: RunDir) -> None:
    request = ProfileRequest(4, 6, (0, 2))
    request.write(run_dir.profile_request_path)
    for rank in (2, 1, 0):
        recorded = train(run_dir, rank, 9)
        facts = {"first_step": 4, "last_step": 6, "ranks": (0, 2), "folder": str(request.folder(run_dir))}
        assert recorded == ([{"kind": "profiled", "problem": None, **facts}] if rank == 0 else [])
    assert not run_dir.profile_request_path.exists()
    assert [path.name for path in sorted(request.folder(run_dir).iterdir())] == ["rank-0.json.gz", "rank-2.json.gz"]
    for rank in (0, 2):
        products = [event for event in events(request.trace(run_dir, rank)) if event.get("name") == "aten::mm"]
        assert len(products) == 3


def test_training_that_ends_before_the_last_step_leaves_what_there_is(run_dir: RunDir) -> None:
    (request := ProfileRequest(3, 100, (0,))).write(run_dir.profile_request_path)
    (recorded,) = train(run_dir, 0, 5)
    assert recorded["problem"] is None
    assert sum(event.get("name") == "aten::mm" for event in events(request.trace(run_dir, 0))) == 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"first_step": 2, "last_step": 3, "ranks": [0]}', "step 5 is done already"),
        ("{", "it cannot be read"),
        ('{"first_step": "x", "last_step": 3, "ranks": [0]}', "it cannot be read"),
        ("[]", "it cannot be read"),
    ],
)
def test_a_request_that_cannot_be_met_is_taken_away(run_dir: RunDir, content: str, problem: str) -> None:
    run_dir.profile_request_path.write_text(content)
    assert train(run_dir, 0, 7, heard_after=5) == [{"kind": "profiled", "problem": problem}]
    assert not run_dir.profile_request_path.exists() and not run_dir.profiles.exists()


def test_after_one_profile_another_may_be_asked_for(run_dir: RunDir) -> None:
    for first in (3, 13):
        ProfileRequest(first, first, (0,)).write(run_dir.profile_request_path)
        (recorded,) = train(run_dir, 0, first + 3, heard_after=first - 1, first=first - 2)
        assert recorded["problem"] is None
    assert len(list(run_dir.profiles.iterdir())) == 2


def test_a_disk_that_does_not_take_it_costs_the_trace_alone(run_dir: RunDir) -> None:
    run_dir.profiles.write_text("no folder")
    ProfileRequest(3, 4, (0,)).write(run_dir.profile_request_path)
    (recorded,) = train(run_dir, 0, 6)
    assert recorded["problem"].startswith("rank 0 could not write its trace: ")
