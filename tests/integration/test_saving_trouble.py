"""Saving that is slow, or fails: training goes on, says so, and no committed checkpoint is harmed."""

import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import drill
from drill import Deed, Doer, Done, DrilledRun, SmallJob, kill
from launcher.job import JobFailed
from trainer.checkpoint import store
from trainer.checkpoint.room import Room

NUM_STEPS = 16


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    return SmallJob(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    with drill.one_ray() as folder:
        yield folder


@pytest.fixture(scope="module")
def undisturbed(job: SmallJob, ray_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DrilledRun:
    run = job.new_run(tmp_path_factory.mktemp("undisturbed"), NUM_STEPS)
    drill.train_to_the_end(run, ray_folder)
    return run


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
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
                f"cannot mount here: {done.stderr.strip()}"
            )
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def train_once(run: DrilledRun, ray_folder: Path, deeds: list[Deed]) -> None:
    """One life, in which all of that is done."""
    done: list[Done] = []
    with drill.supervised(run, ray_folder) as supervisor, Doer(run, deque(deeds), done):
        supervisor.train()
    assert len(done) == len(deeds)


def state_bytes(run: DrilledRun) -> int:
    """Of a checkpoint, in whole pages."""
    return sum(-(-path.stat().st_blocks * 512 // 4096) * 4096 for path in drill.last_checkpoint(run).iterdir())


def fill(folder: Callable[[DrilledRun], Path]) -> Callable[[DrilledRun], bool]:
    def do(run: DrilledRun) -> bool:
        """All that is left, to the last page."""
        with open(folder(run) / "filler", "wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 4096):
                    pass
            except OSError:
                return True
        return False

    return do


def clear(folder: Callable[[DrilledRun], Path]) -> Callable[[DrilledRun], bool]:
    def do(run: DrilledRun) -> bool:
        (folder(run) / "filler").unlink()
        return True

    return do


def checkpoints(run: DrilledRun) -> Path:
    return run.run_dir.checkpoints


def steps_of(run: DrilledRun, kind: str) -> list[int]:
    return [event["step"] for event in run.events(kind)]


# ------------------------------------------------------------------------------------------------------- back-pressure


def pause_service(sign: str) -> Deed:
    return kill("service", sign, number=signal.SIGSTOP)


def wake_service(sign: str, count: int, delay_seconds: float = 0.0) -> Deed:
    return kill("service", sign, count, delay_seconds, number=signal.SIGCONT)


def test_saves_are_skipped_and_counted_while_one_is_slow(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path
) -> None:
    run = job.new_run(tmp_path, NUM_STEPS, when_busy="skip")
    deeds = [pause_service("event checkpoint_snapshot"), wake_service("event checkpoint_skipped", 5)]
    train_once(run, ray_folder, deeds)
    drill.expect_as_if_undisturbed(run, undisturbed)
    taken, skipped = steps_of(run, "checkpoint_snapshot"), steps_of(run, "checkpoint_skipped")
    assert len(skipped) >= 5 and sorted(taken + skipped) == list(range(1, NUM_STEPS + 1))
    assert steps_of(run, "checkpoint_saved")[-1] == NUM_STEPS


def test_saves_wait_for_one_that_is_slow(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path
) -> None:
    run = job.new_run(tmp_path, NUM_STEPS, when_busy="wait")
    seconds = 0.5
    deeds = [pause_service("event checkpoint_snapshot"), wake_service("event step", 1, seconds)]
    train_once(run, ray_folder, deeds)
    drill.expect_as_if_undisturbed(run, undisturbed)
    assert steps_of(run, "checkpoint_snapshot") == list(range(1, NUM_STEPS + 1))
    assert steps_of(run, "checkpoint_saved") == [4, 8, 12, 16]
    assert max(event["seconds"] for event in run.events("checkpoint_snapshot")) > seconds / 2


# ----------------------------------------------------------------------------------------------------- what fails


def test_what_a_killed_job_left_in_memory_does_not_hold_the_next_one_up(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path
) -> None:
    """As it is when all processes are killed at once while ranks copy their state."""
    run = job.new_run(tmp_path, NUM_STEPS)
    room = Room(run.room, range(4))
    room.begin_file(4, rank=1).write_bytes(b"half")
    room.begin_file(4, rank=2)
    room.finish_file(4, rank=2)
    (run.room / "step-00000003.removed").mkdir()
    train_once(run, ray_folder, [])
    drill.expect_as_if_undisturbed(run, undisturbed)


def test_a_full_disk_is_waited_out(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path, tmpfs: Callable[..., Path]
) -> None:
    run = job.new_run(tmp_path, NUM_STEPS, keep_last=1)
    run.run_dir.create(run.config)
    tmpfs(run.run_dir.checkpoints, 4 * state_bytes(undisturbed))
    deeds = [
        Deed("fill", fill(checkpoints), "event checkpoint_saved"),
        Deed("clear", clear(checkpoints), "event checkpoint_failed"),
    ]
    train_once(run, ray_folder, deeds)
    drill.expect_as_if_undisturbed(run, undisturbed)
    (failed,) = run.events("checkpoint_failed")
    assert failed["step"] == 8 and "No space left on device" in failed["reason"]
    assert steps_of(run, "checkpoint_saved")[-1] == NUM_STEPS


def test_a_folder_that_turns_read_only_is_waited_out(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path, tmpfs: Callable[..., Path]
) -> None:
    run = job.new_run(tmp_path, NUM_STEPS)
    run.run_dir.create(run.config)
    mounted = tmpfs(run.run_dir.checkpoints, 8 * state_bytes(undisturbed))

    def remount(mode: str) -> Callable[[DrilledRun], bool]:
        command = ["mount", "-o", f"remount,{mode}", str(mounted)]
        return lambda run: subprocess.run(command, capture_output=True, check=False).returncode == 0

    deeds = [
        Deed("read-only", remount("ro"), "event checkpoint_saved"),
        Deed("verify", verify_all, "event checkpoint_failed"),
        Deed("writable", remount("rw"), "event step"),
    ]
    train_once(run, ray_folder, deeds)
    drill.expect_as_if_undisturbed(run, undisturbed)
    assert all("Read-only file system" in event["reason"] for event in run.events("checkpoint_failed"))
    assert steps_of(run, "checkpoint_saved")[-1] == NUM_STEPS


def verify_all(run: DrilledRun) -> bool:
    steps = store.steps(run.run_dir.checkpoints)
    for step in steps:
        store.verify(run.run_dir.checkpoints / store.folder_name(step))
    return bool(steps)


def test_a_last_checkpoint_that_cannot_be_written_is_a_failure_and_mended_by_the_same_command(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path, tmpfs: Callable[..., Path]
) -> None:
    run = job.new_run(tmp_path, NUM_STEPS)
    run.run_dir.create(run.config)
    tmpfs(run.run_dir.checkpoints, 6 * state_bytes(undisturbed))
    verdict = r"training has ended, but its last checkpoint .*step-00000016 could not be written: No space left on dev"
    with pytest.raises(JobFailed, match=verdict):
        train_once(run, ray_folder, [Deed("fill", fill(checkpoints), "event checkpoint_saved")])
    assert verify_all(run)
    clear(checkpoints)(run)
    train_once(run, ray_folder, [])
    drill.expect_as_if_undisturbed(run, undisturbed)
    assert run.events("training_started")[-1]["tier"] == "memory"
    assert steps_of(run, "step") == list(range(1, NUM_STEPS + 1))  # none was done again


def test_without_room_for_snapshots_training_waits_for_the_disk(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path, tmpfs: Callable[..., Path]
) -> None:
    run = job.new_run(tmp_path, NUM_STEPS)
    tmpfs(run.snapshots_in, state_bytes(undisturbed) // 2)
    train_once(run, ray_folder, [])
    drill.expect_as_if_undisturbed(run, undisturbed)
    failed = run.events("checkpoint_failed")
    assert [event["step"] for event in failed] == list(range(1, NUM_STEPS + 1))
    assert all("no snapshot in shared memory" in event["reason"] for event in failed)
    assert steps_of(run, "checkpoint_saved") == [4, 8, 12, 16]


def test_memory_that_fills_up_while_training_goes_on_is_waited_out(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path, tmpfs: Callable[..., Path]
) -> None:
    """Not a page is left for what the service writes beside the snapshots, which are written over old ones."""
    run = job.new_run(tmp_path, NUM_STEPS)
    memory = tmpfs(tmp_path / "snapshots", 4 * state_bytes(undisturbed))
    deeds = [
        Deed("fill", fill(lambda run: memory), "event checkpoint_snapshot", 3),
        Deed("clear", clear(lambda run: memory), "event checkpoint_failed", 2),
    ]
    train_once(run, ray_folder, deeds)
    drill.expect_as_if_undisturbed(run, undisturbed)
    assert run.events("checkpoint_failed") and steps_of(run, "checkpoint_saved")[-1] == NUM_STEPS


def test_a_folder_for_snapshots_that_cannot_be_used_is_no_end(
    job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path
) -> None:
    run = job.new_run(tmp_path, NUM_STEPS, snapshots_in=str(tmp_path / "run.yaml"))
    with drill.supervised(run, ray_folder) as supervisor:
        supervisor.train()
    assert drill.history(run) == drill.history(undisturbed)
    assert steps_of(run, "checkpoint_saved") == [4, 8, 12, 16]
