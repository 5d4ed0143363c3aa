"""Saving that is slow, or fails: training goes on, says so, and no committed checkpoint is harmed."""

import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

import drill
from deeds import Deed, Doer, Done, kill
from drilled_run import (
    NUM_STEPS,
    DrilledRun,
    SmallJob,
    expect_as_if_undisturbed,
    expect_nothing_left,
    expect_sound_resumes,
    history,
    last_checkpoint,
)
from launcher.job.failures import JobFailed
from launcher.verbs.checkpoints import survey
from trainer.checkpoint.format import store
from trainer.checkpoint.interval import FIRST_INTERVAL_SECONDS, optimal_seconds, read_history
from trainer.checkpoint.service.room import Room
from trainer.data.ledger.audit import audit


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of its own size on a folder."""
    mounted: list[Path] = []

    def mount(path: Path, num_bytes: int) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            give_up(f"cannot mount here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def train_once(run: DrilledRun, deeds: list[Deed]) -> None:
    """One life, in which all of that is done."""
    done: list[Done] = []
    with drill.supervised(run) as supervisor, Doer(run, deque(deeds), done):
        supervisor.train()
    assert len(done) == len(deeds)


def state_bytes(run: DrilledRun) -> int:
    """Of a checkpoint, in whole pages."""
    return sum(-(-path.stat().st_blocks * 512 // 4096) * 4096 for path in last_checkpoint(run).iterdir())


def steps_of(run: DrilledRun, kind: str) -> list[int]:
    return [event["step"] for event in run.events(kind)]


# ------------------------------------------------------------------------------------------------------- back-pressure


def pause_service(sign: str) -> Deed:
    return kill("service", sign, number=signal.SIGSTOP)


def wake_service(sign: str, count: int, delay_seconds: float = 0.0) -> Deed:
    return kill("service", sign, count, delay_seconds, number=signal.SIGCONT)


def leave_half_a_snapshot(run: DrilledRun) -> None:
    """As it is when all processes of a job are killed at once while ranks copy their state."""
    room = Room(run.room, range(4))
    room.begin_file(4, rank=1).write_bytes(b"half")
    room.begin_file(4, rank=2)
    room.finish_file(4, rank=2)
    (run.room / "step-00000003.removed").mkdir()


def test_saves_are_skipped_and_counted_while_one_is_slow(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    """Nor does what an earlier life left in memory hold the run up."""
    run = small_job.new_run(tmp_path, when_busy="skip")
    leave_half_a_snapshot(run)
    deeds = [pause_service("event checkpoint_snapshot"), wake_service("event checkpoint_skipped", 5)]
    train_once(run, deeds)
    expect_as_if_undisturbed(run, undisturbed())
    taken, skipped = steps_of(run, "checkpoint_snapshot"), steps_of(run, "checkpoint_skipped")
    assert len(skipped) >= 5 and sorted(taken + skipped) == list(range(1, NUM_STEPS + 1))
    assert steps_of(run, "checkpoint_saved")[-1] == NUM_STEPS
    counted = survey(run.run_dir.path).saves
    assert counted is not None and counted.num_skipped + counted.num_skipped_snapshots == len(skipped)


@pytest.mark.slow
def test_saves_wait_for_one_that_is_slow(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, when_busy="wait", every_steps=2, snapshot_every_steps=None)
    seconds = 0.5
    deeds = [pause_service("event checkpoint_snapshot"), wake_service("event step", 1, seconds)]
    train_once(run, deeds)
    expect_as_if_undisturbed(run, undisturbed())
    every = list(range(2, NUM_STEPS + 1, 2))
    assert steps_of(run, "checkpoint_snapshot") == steps_of(run, "checkpoint_saved") == every
    assert max(event["seconds"] for event in run.events("checkpoint_waited")) > seconds / 2
    counted = survey(run.run_dir.path).saves
    assert counted is not None and counted.num_waited == len(steps_of(run, "checkpoint_waited"))


@pytest.mark.slow
def test_auto_saves_after_a_minute_and_then_as_seldom_as_a_save_is_cheap(
    small_job: SmallJob, one_ray: None, tmp_path: Path
) -> None:
    """The first save comes when a minute is over, and costs so little that none is due before the end; killed after
    it, the run goes on from it and has kept the measure."""
    num_steps = 2000
    run = small_job.new_run(tmp_path, num_steps, every_steps=None, every_seconds="auto", snapshot_every_steps=None)
    train_once(run, [kill("rank", "event checkpoint_saved", rank=2)])
    first_life, second_life = run.events("training_started")
    first, last = run.events("checkpoint_snapshot")
    assert second_life["step"] == first["step"] and last["step"] == num_steps
    before = [event["time"] for event in run.events("step") if event["step"] == first["step"] - 1]
    assert before[0] - first_life["time"] < FIRST_INTERVAL_SECONDS + 0.1 <= first["time"] - first_life["time"] + 0.2
    seen = read_history(run.events())
    assert seen.stall_seconds == (first["seconds"], last["seconds"])
    assert optimal_seconds(seen, run.config.parallel.num_ranks) > 10 * FIRST_INTERVAL_SECONDS
    expect_sound_resumes(run)
    assert not audit(run.run_dir).findings
    expect_nothing_left(run)


# ---------------------------------------------------------------------------------------------------------- a sick disk


def test_training_goes_on_while_the_disk_is_full_or_read_only_and_fails_only_without_its_last_checkpoint(
    small_job: SmallJob,
    one_ray: None,
    undisturbed: Callable[..., DrilledRun],
    tmp_path: Path,
    tmpfs: Callable[..., Path],
) -> None:
    """Each is mended in time but the last, after which the same command has nothing to do again."""
    run = small_job.new_run(tmp_path, every_steps=2)
    mounted = tmpfs(run.run_dir.checkpoints, 6 * state_bytes(undisturbed()))
    deeds = [
        Deed("fill", fill(mounted), "event checkpoint_saved"),
        Deed("verify", verify_all, "event checkpoint_failed"),
        Deed("clear", clear(mounted), "event step"),
        Deed("read-only", remount(mounted, "ro"), "event checkpoint_saved", 2),
        Deed("verify", verify_all, "event checkpoint_failed"),
        Deed("writable", remount(mounted, "rw"), "event step"),
        Deed("fill", fill(mounted), "event checkpoint_saved"),
    ]
    with drill.supervised(run) as supervisor:
        done: list[Done] = []
        verdict = r"training has ended, but its last checkpoint .*16 could not be written: No space left on device"
        with pytest.raises(JobFailed, match=verdict), Doer(run, deque(deeds), done):
            supervisor.train()
        assert len(done) == len(deeds) and verify_all(run)
        reasons = [event["reason"].split(":")[0] for event in run.events("checkpoint_failed")]
        assert [reason for reason, _ in groupby(reasons)] == [
            "No space left on device",
            "Read-only file system",
            "No space left on device",
        ]
        clear(mounted)(run)
        supervisor.train()
    expect_as_if_undisturbed(run, undisturbed())
    assert run.events("training_started")[-1]["tier"] == "memory"
    assert steps_of(run, "step") == list(range(1, NUM_STEPS + 1))  # none was done again
    saved = steps_of(run, "checkpoint_saved")
    assert saved == sorted(saved), "an old one was written after a newer one"


def fill(folder: Path) -> Callable[[DrilledRun], bool]:
    def do(_: DrilledRun) -> bool:
        """All that is left, to the last page."""
        with open(folder / "filler", "wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                return True
        return False

    return do


def clear(folder: Path) -> Callable[[DrilledRun], bool]:
    def do(_: DrilledRun) -> bool:
        (folder / "filler").unlink()
        return True

    return do


def remount(folder: Path, mode: str) -> Callable[[DrilledRun], bool]:
    """Refused while somebody writes there."""
    command = ["mount", "-o", f"remount,{mode}", str(folder)]
    return lambda _: subprocess.run(command, capture_output=True, check=False).returncode == 0


def verify_all(run: DrilledRun) -> bool:
    steps = store.steps(run.run_dir.checkpoints)
    for step in steps:
        store.verify(run.run_dir.checkpoints / store.folder_name(step))
    return bool(steps)


# ---------------------------------------------------------------------------------------------------- too little memory


@pytest.mark.slow
def test_without_room_for_snapshots_training_waits_for_the_disk(
    small_job: SmallJob,
    one_ray: None,
    undisturbed: Callable[..., DrilledRun],
    tmp_path: Path,
    tmpfs: Callable[..., Path],
) -> None:
    run = small_job.new_run(tmp_path)
    tmpfs(run.snapshots_in, state_bytes(undisturbed()) // 2)
    train_once(run, [])
    expect_as_if_undisturbed(run, undisturbed())
    failed = run.events("checkpoint_failed")
    assert [event["step"] for event in failed] == list(range(1, NUM_STEPS + 1))
    assert all("no snapshot in shared memory" in event["reason"] for event in failed)
    assert steps_of(run, "checkpoint_saved") == [4, 8, 12, 16]


@pytest.mark.slow
def test_memory_that_somebody_fills_is_waited_out(
    small_job: SmallJob,
    one_ray: None,
    undisturbed: Callable[..., DrilledRun],
    tmp_path: Path,
    tmpfs: Callable[..., Path],
) -> None:
    """Not a page is left for what is written beside the snapshots, which are written over old ones."""
    run = small_job.new_run(tmp_path)
    memory = tmpfs(run.snapshots_in, 4 * state_bytes(undisturbed()))
    deeds = [
        Deed("fill", fill(memory), "event checkpoint_snapshot", 3),
        Deed("clear", clear(memory), "event checkpoint_failed", 2),
    ]
    train_once(run, deeds)
    expect_as_if_undisturbed(run, undisturbed())
    assert steps_of(run, "checkpoint_saved")[-1] == NUM_STEPS


@pytest.mark.slow
def test_a_folder_for_snapshots_that_cannot_be_used_is_no_end(
    small_job: SmallJob, one_ray: None, undisturbed: Callable[..., DrilledRun], tmp_path: Path
) -> None:
    run = small_job.new_run(tmp_path, snapshots_in=str(tmp_path / "run.yaml"))
    with drill.supervised(run) as supervisor:
        supervisor.train()
    assert history(run) == history(undisturbed())
    assert steps_of(run, "checkpoint_saved") == [4, 8, 12, 16]
