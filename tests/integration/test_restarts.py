"""From where a run goes on: memory while its command lives, or was killed with all else; a checkpoint after its end."""

import os
import signal
import subprocess
from collections import deque
from pathlib import Path

import pytest

import drill
from deeds import Deed, Doer, Done, find, kill
from drilled_run import DrilledRun, SmallJob, expect_exact_ledger, expect_nothing_left, expect_sound_resumes
from launcher.job.failures import JobFailed
from trainer.checkpoint.format import store

NUM_STEPS = 8
SNAPSHOTS_ALONE = {"every_steps": 100, "snapshot_every_steps": 1}  # but for the checkpoint at the end


def newest_snapshot(run: DrilledRun) -> int:
    """Of those that were recorded; a rank may be killed just before it records one."""
    return max(event["step"] for event in run.events("checkpoint_snapshot"))


def expect_whole(run: DrilledRun) -> None:
    expect_sound_resumes(run)
    expect_exact_ledger(run)
    expect_nothing_left(run)


@pytest.mark.slow
def test_a_run_that_fails_for_good_leaves_its_newest_snapshot_as_a_checkpoint(
    small_job: SmallJob, one_ray: None, tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, NUM_STEPS, supervise={"max_failures": 0}, **SNAPSHOTS_ALONE)
    done: list[Done] = []
    deeds = deque([kill("rank", "event checkpoint_snapshot", 3, rank=2)])
    with drill.supervised(run) as supervisor, Doer(run, deeds, done), pytest.raises(JobFailed, match="rank 2 was kill"):
        supervisor.train()
    (step,) = (event["step"] for event in run.events("checkpoint_saved"))
    assert done and newest_snapshot(run) <= step < NUM_STEPS
    expect_nothing_left(run)
    drill.train_to_the_end(run)
    assert [(event["step"], event["tier"]) for event in run.events("training_started")] == [(0, "disk"), (step, "disk")]
    expect_whole(run)


@pytest.mark.slow
def test_after_everything_was_killed_the_newest_snapshot_is_in_memory(small_job: SmallJob, tmp_path: Path) -> None:
    """By the command, and with it the service, which would otherwise save what it has."""
    run = small_job.new_run(tmp_path, NUM_STEPS, **SNAPSHOTS_ALONE)
    process = subprocess.Popen(run.command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    done: list[Done] = []
    deed = Deed("SIGKILL to everything", kill_everything, "event checkpoint_snapshot", 3, ends_life=True)
    with Doer(run, deque([deed]), done):
        _, complaint = process.communicate(timeout=drill.PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL and done, complaint
    newest = newest_snapshot(run)
    assert store.steps(run.room)[-1] >= newest >= 3 and not store.steps(run.run_dir.checkpoints)
    again = subprocess.run(run.command, capture_output=True, text=True, check=False, timeout=drill.PATIENCE_SECONDS)
    assert again.returncode == 0, again.stderr
    started = run.events("training_started")[-1]
    assert started["tier"] == "memory" and started["step"] >= newest
    expect_whole(run)


def kill_everything(run: DrilledRun) -> bool:
    """The service is stopped first, so that it is not the one that outlives the others, and the agent replaces none."""
    pids = [find(run, target) for target in ("service", "agent", "job")]
    if None in pids:
        return False
    service, agent, job = (pid for pid in pids if pid is not None)
    os.kill(service, signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)
    os.kill(service, signal.SIGKILL)
    os.killpg(job, signal.SIGKILL)
    return True
