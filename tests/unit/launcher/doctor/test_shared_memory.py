"""/dev/shm, and room for snapshots."""

from pathlib import Path

import pytest

from launcher import memory
from launcher.doctor.checks.shared_memory import Space, judge, judge_snapshots, measure
from trainer.config import RunConfig
from trainer.config_file import from_tree

DOCKER = Space("/dev/shm", size_bytes=64 << 20, free_bytes=64 << 20)
LAPTOP = Space("/dev/shm", size_bytes=8 * 10**9, free_bytes=8 * 10**9)


def config(**checkpoint: object) -> RunConfig:
    return from_tree({"preset": "gpt2_small", "checkpoint": checkpoint})


def test_dockers_default_fails_ranks_on_gpus_and_warns_others() -> None:
    found = judge(DOCKER, on_gpus=True)
    assert (found.verdict, found.measured) == (
        "fail",
        "/dev/shm has 67.1 MB, 67.1 MB free; NCCL and Ray want 1 GB",
    )
    assert "docker run --shm-size" in found.fix and "emptyDir of medium Memory" in found.fix
    assert judge(DOCKER, on_gpus=False).verdict == "warn"
    assert judge(LAPTOP, on_gpus=True).verdict == "ok"


def test_snapshots_need_room_for_all_that_are_kept() -> None:
    """12 bytes a parameter, twice, or three times with snapshots for restarts: docs/checkpoints.md."""
    one = memory.snapshot_bytes(config())
    assert one == pytest.approx(12 * 124.4e6, rel=0.01)
    for space, verdict in ((0.9 * one, "fail"), (1.1 * one, "warn"), (2.1 * one, "ok")):
        assert judge_snapshots(Space("/dev/shm", 8 * 10**9, int(space)), config()).verdict == verdict
    for_restarts = config(snapshot_every_steps=50)
    assert judge_snapshots(Space("/dev/shm", 8 * 10**9, int(2.1 * one)), for_restarts).verdict == "warn"
    found = judge_snapshots(DOCKER, for_restarts)
    assert found.verdict == "fail"
    assert "a snapshot takes 1.5 GB on a machine, and 3 of them are kept" in found.measured
    assert found.fix.startswith("make room for 4.5 GB (docker run --shm-size")


def test_runs_that_leave_no_snapshots_need_no_room() -> None:
    assert judge_snapshots(DOCKER, config(asynchronous=False)).verdict == "skipped"
    assert judge_snapshots(DOCKER, None).verdict == "skipped"


def test_a_folder_that_is_not_there_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    found = measure(tmp_path / "not" / "there")
    assert found.folder == str(tmp_path / "not" / "there")
    assert 0 < found.free_bytes <= found.size_bytes
    assert not list(tmp_path.iterdir())
