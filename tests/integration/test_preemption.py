"""A run that is asked to end saves within the grace period, ends as preempted, and goes on as if undisturbed."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

import drill
from deeds import Deed, Doer, Done, Target, find, kill
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed, processes_of
from launcher.verbs.stages import is_finished
from small_run import BROADGAUGE, write_config
from trainer import config_file
from trainer.events import Event
from trainer.run_dir import RunDir


def sigterm(target: Target, sign: str, count: int = 1, rank: int = 0, *, ends_life: bool = True) -> Deed:
    return kill(target, sign, count, rank=rank, number=signal.SIGTERM, ends_life=ends_life)


def ask_by_file(run: DrilledRun) -> bool:
    run.run_dir.stop_path.touch()
    return True


def expect_saved_and_resumed(run: DrilledRun) -> list[Event]:
    """Returns the events of the preemptions: each life went on from the very step after which the one before ended."""
    told = run.events("preempted", "training_started")
    for stopped, started in pairwise(told):
        if stopped["kind"] == "preempted":
            assert stopped["saved_step"] == stopped["step"] == started["step"]
            assert started["kind"] == "training_started"
    return [event for event in told if event["kind"] == "preempted"]


def test_whoever_asks_the_run_saves_ends_and_goes_on(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path)
    deeds = [
        sigterm("driver", "event training_started"),  # it is evaluating
        sigterm("driver", "event step", 2, ends_life=False),
        sigterm("driver", "event step", 0),  # and again at once
        sigterm("rank", "event step", 2, rank=3),
        Deed("stop file", ask_by_file, "event step", 2, ends_life=True),
    ]
    done: list[Done] = []
    drill.train_to_the_end(run, deeds, done)
    assert len(done) == len(deeds)
    expect_as_if_undisturbed(run, undisturbed())
    asked = expect_saved_and_resumed(run)
    assert [event["reason"] for event in asked] == [
        "SIGTERM",
        "SIGTERM",
        "SIGTERM to a rank",
        f"the file {run.run_dir.stop_path.resolve()}",
    ]


@pytest.mark.slow
def test_ranks_that_do_not_end_in_time_are_killed(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    """One hangs; what was saved before is what the run goes on from."""
    run = small_job.new_run(tmp_path, grace_seconds=0.5)
    deeds = [
        kill("rank", "event checkpoint_saved", rank=1, number=signal.SIGSTOP, ends_life=False),
        sigterm("driver", "event step", 0),
    ]
    drill.train_to_the_end(run, deeds)
    expect_as_if_undisturbed(run, undisturbed())
    (preempted,) = run.events("preempted")
    assert "did not end in time (checkpoint.grace_seconds 0.5) and were killed" in preempted["reason"]
    assert run.events("training_started")[-1]["step"] >= 4


@pytest.mark.slow
def test_a_machine_that_leaves_before_its_ranks_have_saved_was_preempted_too(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path)
    deeds = [
        kill("rank", "event checkpoint_saved", rank=1, number=signal.SIGSTOP, ends_life=False),
        sigterm("driver", "event step", 0, ends_life=False),
        kill("agent", "event step", 0),
    ]
    drill.train_to_the_end(run, deeds)
    expect_as_if_undisturbed(run, undisturbed())
    (preempted,) = run.events("preempted")
    assert preempted["reason"].startswith("SIGTERM, then node 0: the agent died")


@pytest.mark.slow
def test_no_time_at_all_harms_nothing(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, grace_seconds=0.01)
    deeds = [sigterm("driver", sign, 2) for sign in ("event step", "room step-*/rank-*.part", "event step")]
    drill.train_to_the_end(run, deeds)
    expect_as_if_undisturbed(run, undisturbed())
    assert len(run.events("preempted")) == len(deeds)


# ------------------------------------------------------------------------------------------------------ by the command


def start_and_preempt(command: list[str], run: DrilledRun, deed: Deed) -> str:
    """Start the command and ask it to end; returns what it complained."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    done: list[Done] = []
    with Doer(run, deque([deed]), done):
        _, complaint = process.communicate(timeout=drill.PATIENCE_SECONDS)
    assert done, f"it ended before {deed}: {complaint}"
    assert process.returncode == 75, complaint
    assert not processes_of(run)
    return complaint.strip()


def test_sigterm_while_ranks_start_ends_the_command_as_preempted(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path)
    began = time.time()
    complaint = start_and_preempt(run.command, run, sigterm("driver", "event stage_started"))
    assert complaint == "preempted: SIGTERM; the same command goes on"
    kinds = [event["kind"] for event in run.events()]
    assert kinds.count("preempted") == 1 and not {"failed", "training_started", "run_finished"} & set(kinds)
    assert run.events("preempted")[0]["time"] - began < drill.PATIENCE_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_in_every_stage(tmp_path: Path) -> None:
    """Raw text to an export, with an exit code of 75 after each."""
    path = write_config(tmp_path, checkpoint={"snapshots_in": str(tmp_path)}, evaluation={"every_steps": 2})
    runs = {name: RunDir(tmp_path / name) for name in ("run", "undisturbed")}
    commands = {name: [BROADGAUGE, "run", str(path), "--run-dir", str(run_dir.path)] for name, run_dir in runs.items()}
    run = DrilledRun(config_file.load(path), path, runs["run"])
    run.run_dir.create(run.config)
    signs = [
        *(f"event {kind}" for kind in ("stage_started", "data_prepared", "blend", "training_started")),
        *("event step", "event evaluated", "event checkpoint_snapshot"),
    ]
    for sign in signs:
        start_and_preempt(commands["run"], run, sigterm("driver", sign, 2 if sign == "event evaluated" else 1))
    start_and_preempt(commands["run"], run, Deed("SIGTERM in export", sigterm_in("export"), "event stage_started"))
    start_and_preempt(commands["run"], run, Deed("SIGTERM in generate", sigterm_in("generate"), "event stage_started"))
    assert not run.events("run_finished")
    for command in commands.values():
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert is_finished(runs["run"])
    weights = [run_dir.export / "model.safetensors" for run_dir in runs.values()]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def sigterm_in(stage: str) -> Callable[[DrilledRun], bool]:
    """Once the stage has begun."""

    def do(run: DrilledRun) -> bool:
        begun = [event["stage"] for event in run.events("stage_started")]
        pid = find(run, "driver")
        if stage not in begun[-1:] or pid is None or pid == os.getpid():
            return False
        os.kill(pid, signal.SIGTERM)
        return True

    return do
