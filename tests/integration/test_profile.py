"""A profile of ranks that train: it is there, and the run is as if nobody had asked."""

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import drill
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed
from launcher.verbs import profiling
from prometheus_server import until
from small_run import broadgauge
from trainer.config import UserError
from trainer.profiling import ProfileRequest


def test_ranks_are_profiled_and_the_run_goes_on(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    expected, run = undisturbed(), small_job.new_run(tmp_path)
    request = ProfileRequest(9, 11, (1, 3))
    request.write(run.run_dir.profile_request_path)  # the ranks hear of it after their first step
    drill.train_to_the_end(run)
    expect_profiled(run, request)
    expect_as_if_undisturbed(run, expected)


@pytest.mark.slow
def test_whoever_asks_for_a_profile_is_told_where_it_is(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path, 400)
    command = subprocess.Popen(run.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: run.events("step"), "a step")
        asked = broadgauge("profile", run.run_dir.path, "--steps", "200:202", "--rank", 3, "--rank", 1)
        assert asked.returncode == 0, asked.stderr
        request = ProfileRequest(200, 202, (1, 3))
        assert asked.stdout.split() == [str(request.trace(run.run_dir, rank)) for rank in (1, 3)]
        expect_profiled(run, request)
    finally:
        command.terminate()
        command.wait(60)
    refused = broadgauge("profile", run.run_dir.path, "--steps", "20:21")
    assert refused.returncode == 2 and "no command of this machine works on" in refused.stderr


def expect_profiled(run: DrilledRun, request: ProfileRequest) -> None:
    """Its steps, of its ranks alone."""
    paths = [request.trace(run.run_dir, rank) for rank in request.ranks]
    assert sorted(request.folder(run.run_dir).iterdir()) == paths
    for path in paths:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        updates = [event for event in events if event.get("name") == "Optimizer.step#GatedAdamW.step"]
        assert len(updates) == 3
    (told,) = run.events("profiled")
    assert (told["first_step"], told["last_step"], told["problem"]) == (request.first_step, request.last_step, None)


@pytest.mark.parametrize("steps", ["9", "9:", "a:b", "0:3", "9:8", "-1:3", ""])
def test_what_are_no_steps_is_refused(steps: str) -> None:
    with pytest.raises(UserError, match=r"is no range; give the first step and the last, like 15:17"):
        profiling._parsed(steps, 5)


def test_steps_that_have_passed_are_refused() -> None:
    with pytest.raises(UserError, match=r"--steps 6:9: step 5 is done and the next one begins; begin with 8 or later"):
        profiling._parsed("6:9", 5)
    assert profiling._parsed("7:9", 5) == (7, 9)
