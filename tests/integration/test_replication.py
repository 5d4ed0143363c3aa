"""A machine is lost with its memory, and the run goes on from its neighbour's copy: real ranks on two Ray nodes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.job.failures import RankFailed
from launcher.job.ranks import Ranks, ready_ranks
from machines import machines
from small_run import NUM_STEPS, broadgauge, write_config
from trainer import config_file
from trainer.checkpoint.format import store
from trainer.config import RunConfig
from trainer.events import read_events, surviving_steps
from trainer.run_dir import RunDir

PATIENCE_SECONDS = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * PATIENCE_SECONDS)]


@contextmanager
def ranks_of(config: RunConfig, run_dir: RunDir) -> Iterator[Ranks]:
    run_dir.create(config)
    with ready_ranks(config, run_dir, on_cluster=True) as ranks:
        yield ranks


def kill_rank(run_dir: RunDir, is_time: Callable[[], bool]) -> Callable[[], None]:
    """Kill a rank of the second machine, by what only it has open."""

    def on_poll() -> None:
        if is_time():
            log = str(run_dir.logs / "rank-1.log")
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    if os.readlink(f"/proc/{pid}/fd/1") == log:
                        os.kill(int(pid), 9)
                except OSError:
                    continue

    return on_poll


def test_the_copy_of_a_lost_machine_s_snapshot_is_gone_on_from(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        parallel={"tensor": 1, "pipeline": 1, "data": 2},
        launch={"nodes": 2, "device": "cpu"},
        train={"total_tokens": 8 * NUM_STEPS * 16 * 32},
        checkpoint={
            "every_steps": 1000,
            "snapshot_every_steps": 2,
            "replicate": True,
            "snapshots_in": str(tmp_path / "memory"),
        },
    )
    prepared = tmp_path / "data"
    assert broadgauge("prepare", path, "--out", prepared).returncode == 0
    config = config_file.load(path, [f"data.prepared={prepared}"])
    undisturbed, disturbed = RunDir(tmp_path / "undisturbed"), RunDir((tmp_path / "disturbed").resolve())
    with machines(2):
        with ranks_of(config, undisturbed) as ranks:
            ranks.run("train", lambda: None)
        memory = tmp_path / "memory"
        assert not list(memory.rglob("*.safetensors"))  # given back at the end

        def both_are_copied() -> bool:
            replicas = list(memory.rglob("replica/step-*/manifest.json"))
            return len(replicas) == 2

        with ranks_of(config, disturbed) as ranks, pytest.raises(RankFailed):
            ranks.run("train", kill_rank(disturbed, both_are_copied))
        (room,) = memory.rglob("node-00001")
        for item in room.glob("step-*"):
            store._remove(item)
        with ranks_of(config, disturbed) as ranks:
            ranks.run("train", lambda: None)
    starts = [event for event in read_events(disturbed.events_path) if event["kind"] == "training_started"]
    assert [start["tier"] for start in starts] == ["disk", "memory"] and starts[1]["step"] > 0
    losses = [
        [event["loss"] for event in surviving_steps(read_events(run.events_path))] for run in (undisturbed, disturbed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8 * NUM_STEPS
