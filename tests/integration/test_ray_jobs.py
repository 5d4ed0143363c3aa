"""A run handed to a real Ray cluster by its job server: followed, refused, stopped, killed, and gone on with."""

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from deeds import find
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed, processes_of
from launcher.job.failures import JobFailed
from launcher.submit import ray_jobs
from launcher.submit.ray_jobs import Submitted
from launcher.verbs.stages import is_finished
from ray_head import RayHead, client_with
from trainer.config import UserError
from trainer.run_dir import RunDir
from trainer.stop import Interrupted, Preempted

NUM_STEPS = 16
PATIENCE_SECONDS = 120  # only a broken program waits this long
pytestmark = pytest.mark.timeout(4 * PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    head = RayHead()
    try:
        yield head
    finally:
        head.kill()


@pytest.fixture(autouse=True)
def _client(head: RayHead) -> Iterator[None]:
    with client_with(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=head.token):
        yield


@pytest.fixture(scope="module")
def reference(small_job: SmallJob, head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> DrilledRun:
    """A run that nobody disturbs, on the cluster."""
    run = small_job.new_run(tmp_path_factory.mktemp("reference"), NUM_STEPS)
    printed: list[str] = []
    with client_with(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=head.token):
        ray_jobs.follow(submit(run, head), printed.append)
    assert f"{run.run_dir.export}: 28 of 28 tensors equal bit for bit" in " ".join("".join(printed).split())
    return run


def submit(run: DrilledRun, head: RayHead) -> Submitted:
    return ray_jobs.submit(run.config, run.run_dir.path, head.url, python=sys.executable)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def expect_gone_on(run: DrilledRun) -> None:
    """Each life after a stop began at the very step after which the one before had saved."""
    told = run.events("preempted", "training_started")
    stopped = [(first, second) for first, second in pairwise(told) if first["kind"] == "preempted"]
    assert stopped
    for first, second in stopped:
        assert first["saved_step"] == first["step"] == second["step"] > 0


def test_a_run_is_followed_to_its_end_and_not_done_twice(reference: DrilledRun, head: RayHead) -> None:
    expect_as_if_undisturbed(reference, reference)
    assert is_finished(reference.run_dir)
    again = submit(reference, head)
    assert again.had_succeeded and again.attempt.number == 1
    assert again.line.startswith(f"{again.attempt.id} has succeeded already; nothing to do")
    with pytest.raises(UserError, match=r"is not at work on .*: broadgauge-small-\w+ has ended \(succeeded\)"):
        ray_jobs.stop(reference.config, reference.run_dir.path, head.url)


@pytest.mark.slow
def test_a_run_that_is_stopped_has_saved_and_goes_on(
    small_job: SmallJob, head: RayHead, reference: DrilledRun, tmp_path: Path
) -> None:
    """Meanwhile Ctrl-C ends the following alone, and nobody else may begin it."""
    run, printed = small_job.new_run(tmp_path, NUM_STEPS), list[str]()
    first = submit(run, head)

    def interrupt(text: str) -> None:
        printed.append(text)
        if len(printed) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    goes_on = "no longer following; the job goes on: follow it with `ray job logs --follow"
    with pytest.raises(Interrupted, match=goes_on):
        ray_jobs.follow(first, interrupt)
    with pytest.raises(UserError, match=f"{first.attempt.id} is at work on this run; follow it with") as refusal:
        submit(run, head)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError) as refused_later:  # somebody who looked a moment before it began
        ray_jobs._start(first.cluster, run.config, run.run_dir.path, 1, sys.executable)
    assert str(refused_later.value) == str(refusal.value)

    wait_for(lambda: run.events("step"), "no step was done")
    assert ray_jobs.stop(run.config, run.run_dir.path, head.url) == first.attempt.id
    with pytest.raises(Preempted, match=r"SIGTERM: stopped after step \d+, saved at step \d+; .*submit the run again"):
        ray_jobs.follow(first, printed.append)

    second = submit(run, head)
    assert second.attempt.id == f"{first.attempt.id}-2" and "attempt 2" in second.line
    ray_jobs.follow(second, printed.append)
    expect_gone_on(run)
    expect_as_if_undisturbed(run, reference)


def test_who_has_no_token_is_told_what_to_set(small_job: SmallJob, head: RayHead, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path)
    fix = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token or RAY_AUTH_TOKEN_PATH to its file"
    (tmp_path / "empty").touch()
    for variables in (
        {},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": 64 * "0"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "empty")},
    ):
        with client_with(**variables), pytest.raises(UserError) as refusal:
            submit(run, head)
        assert str(refusal.value).startswith(f"{head.url} does not let us in (")
        assert str(refusal.value).endswith(f"); {fix}") and "\n" not in str(refusal.value)
    (tmp_path / "token").write_text(head.token)
    path = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    with client_with(**path), pytest.raises(UserError, match="it was never submitted there"):
        ray_jobs.stop(run.config, run.run_dir.path, head.url)


def test_where_no_cluster_is_it_is_one_line(small_job: SmallJob, head: RayHead, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path)
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        to = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        # somebody else's address in the environment is not the one that was asked for
        with (
            client_with(RAY_ADDRESS=head.url, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=head.token),
            pytest.raises(UserError) as refusal,
        ):
            ray_jobs.submit(run.config, run.run_dir.path, to)
    assert str(refusal.value) == (
        f"--to {to}: nothing answers at {to} (Connection refused); start the cluster, or give its dashboard's address, "
        "http://HOST:PORT"
    )


# ---------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_a_cluster_that_is_lost_is_told_and_another_goes_on_from_the_disk(
    small_job: SmallJob, reference: DrilledRun, tmp_path: Path
) -> None:
    """All processes of the head and of the job are killed at once, and what lay in the machine's memory is gone."""
    run = small_job.new_run(tmp_path, NUM_STEPS)
    lost = RayHead()

    def lose() -> None:
        try:
            wait_for(lambda: run.events("checkpoint_saved"), "nothing was saved")
        finally:
            lost.kill()

    killer = threading.Thread(target=lose)
    with client_with(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=lost.token):
        first = submit(run, lost)
        killer.start()
        with pytest.raises(JobFailed, match=f"lost {first.attempt.id}: .*submit the run again to go on"):
            ray_jobs.follow(first, lambda text: None, patience_seconds=2)
        killer.join()
        with pytest.raises(UserError, match="nothing answers at"):
            submit(run, lost)
    assert not processes_of(run)
    shutil.rmtree(run.room)
    saved = max(event["step"] for event in run.events("checkpoint_saved"))
    assert saved < NUM_STEPS

    fresh = RayHead()
    try:
        with client_with(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=fresh.token):
            second = submit(run, fresh)
            assert second.attempt.id == first.attempt.id  # it knows of no other
            ray_jobs.follow(second, lambda text: None)
    finally:
        fresh.kill()
    started = run.events("training_started")[-1]
    assert (started["step"], started["tier"]) == (saved, "disk")
    expect_as_if_undisturbed(run, reference)


@pytest.mark.slow
def test_what_the_run_refuses_is_told_as_if_it_were_started_here(
    small_job: SmallJob, head: RayHead, tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/letter").touch()
    occupied = replace(run, run_dir=RunDir(tmp_path / "occupied"))
    submitted = submit(occupied, head)
    with pytest.raises(UserError, match=f"{submitted.attempt.id}: .*occupied is not empty and holds no config.yaml"):
        ray_jobs.follow(submitted, lambda text: None)
    again = ray_jobs.submit(run.config, occupied.run_dir.path, head.url, python="/nowhere/python")
    assert again.attempt.number == 2
    with pytest.raises(UserError, match="the cluster's head has no /nowhere/python; give"):
        ray_jobs.follow(again, lambda text: None)


@pytest.mark.slow
def test_a_stopped_run_has_its_whole_grace_period(
    small_job: SmallJob, head: RayHead, reference: DrilledRun, tmp_path: Path
) -> None:
    """Longer than the 3 s that Ray gives by itself before it kills: here a rank hangs."""
    run = small_job.new_run(tmp_path, NUM_STEPS, grace_seconds=6.0)
    first = submit(run, head)
    wait_for(lambda: run.events("checkpoint_saved"), "nothing was saved")
    hanging = find(run, "rank", 1)
    assert hanging is not None
    os.kill(hanging, signal.SIGSTOP)
    ray_jobs.stop(run.config, run.run_dir.path, head.url)
    with pytest.raises(Preempted, match=r"SIGTERM: the ranks did not end in time \(checkpoint.grace_seconds 6\)"):
        ray_jobs.follow(first, lambda text: None)
    ray_jobs.follow(submit(run, head), lambda text: None)
    expect_as_if_undisturbed(run, reference)


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_nothing_at_work_and_the_run_goes_on(
    small_job: SmallJob, head: RayHead, reference: DrilledRun, tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, NUM_STEPS)
    first = submit(run, head)
    wait_for(lambda: run.events("checkpoint_saved"), "nothing was saved")
    (driver,) = [pid for pid, line in processes_of(run).items() if "launcher.cli.main" in line]
    os.kill(driver, signal.SIGKILL)
    with pytest.raises(JobFailed, match=f"{first.attempt.id}: exit code -9; submit the run again to go on"):
        ray_jobs.follow(first, lambda text: None)
    ray_jobs.follow(submit(run, head), lambda text: None)
    assert run.events("training_started")[-1]["step"] > 0
    expect_as_if_undisturbed(run, reference)
