"""A run that is asked to end saves within the grace period, ends as preempted, and goes on as if undisturbed."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

import drill
from drill import Deed, Doer, Done, DrilledRun, SmallJob, kill
from launcher import job as jobs
from launcher import ownership, stages
from launcher.embedded_ray import isolated
from launcher.session import session
from launcher.stages import is_finished
from small_run import BROADGAUGE, write_config
from trainer import config_file
from trainer.checkpoint import store
from trainer.events import Event
from trainer.run_dir import RunDir
from trainer.stop import Preempted

NUM_STEPS = 16


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    return SmallJob(tmp_path_factory.mktemp("job"))


def sigterm(target: drill.Target, sign: str, count: int = 1, rank: int = 0, *, ends_life: bool = True) -> Deed:
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


class TestOnOneRay:
    @pytest.fixture(scope="class")
    def ray_folder(self) -> Iterator[Path]:
        with drill.one_ray() as folder:
            yield folder

    @pytest.fixture(scope="class")
    def undisturbed(self, job: SmallJob, ray_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DrilledRun:
        run = job.new_run(tmp_path_factory.mktemp("undisturbed"), NUM_STEPS)
        drill.train_to_the_end(run, ray_folder)
        return run

    def test_whoever_asks_the_run_saves_ends_and_goes_on(
        self, job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path
    ) -> None:
        run = job.new_run(tmp_path, NUM_STEPS)
        deeds = [
            sigterm("driver", "event training_started"),  # it is evaluating
            sigterm("driver", "event step", 2, ends_life=False),
            sigterm("driver", "event step", 0),  # and again at once
            sigterm("rank", "event step", 2, rank=3),
            Deed("stop file", ask_by_file, "event step", 2, ends_life=True),
        ]
        done: list[Done] = []
        drill.train_to_the_end(run, ray_folder, deeds, done)
        assert len(done) == len(deeds)
        drill.expect_as_if_undisturbed(run, undisturbed)
        asked = expect_saved_and_resumed(run)
        assert [event["reason"] for event in asked] == [
            "SIGTERM",
            "SIGTERM",
            "SIGTERM to a rank",
            f"the file {run.run_dir.stop_path.resolve()}",
        ]

    def test_ranks_that_do_not_end_in_time_are_killed(
        self, job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path
    ) -> None:
        """One hangs; what was saved before is what the run goes on from."""
        run = job.new_run(tmp_path, NUM_STEPS, grace_seconds=0.5)
        deeds = [
            kill("rank", "event checkpoint_saved", rank=1, number=signal.SIGSTOP, ends_life=False),
            sigterm("driver", "event step", 0),
        ]
        drill.train_to_the_end(run, ray_folder, deeds)
        drill.expect_as_if_undisturbed(run, undisturbed)
        (preempted,) = run.events("preempted")
        assert "did not end in time (checkpoint.grace_seconds 0.5) and were killed" in preempted["reason"]
        assert run.events("training_started")[-1]["step"] >= 4

    @pytest.mark.slow
    def test_no_time_at_all_harms_nothing(
        self, job: SmallJob, ray_folder: Path, undisturbed: DrilledRun, tmp_path: Path
    ) -> None:
        run = job.new_run(tmp_path, NUM_STEPS, grace_seconds=0.01)
        deeds = [sigterm("driver", sign, 2) for sign in ("event step", "room step-*/rank-*.part", "event step")]
        drill.train_to_the_end(run, ray_folder, deeds)
        drill.expect_as_if_undisturbed(run, undisturbed)
        assert len(run.events("preempted")) == len(deeds)


def test_a_node_that_ray_is_to_drain_ends_the_run(job: SmallJob, tmp_path: Path) -> None:
    run = job.new_run(tmp_path, num_steps=400)
    with session() as folder, isolated(), drill.claimed(run) as claimed:
        os.environ["RAY_TMPDIR"] = str(folder)  # `isolated` removes it at its end
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=1, include_dashboard=False, node_ip_address="127.0.0.1")
            ray.init(cluster.address, log_to_driver=False, configure_logging=False)
            new_job = jobs._new_job(run.config, run.run_dir, jobs.RANK_TARGET)
            ownership.claim(new_job.lock, new_job.id, drill.PATIENCE_SECONDS)
            gcs = GcsClient(address=cluster.address)
            (node,) = (each["NodeID"] for each in ray.nodes())

            def drain(_: DrilledRun) -> bool:
                """As `ray drain-node` does, which takes 127.0.0.1 for another address of the machine."""
                deadline_ms = time.time_ns() // 1_000_000 + 60_000
                preemption = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
                is_accepted, why_not = gcs.drain_node(node, preemption, "drill", deadline_ms)
                assert is_accepted, why_not
                return True

            with jobs.ranks_on_cluster(new_job, folder) as ranks:
                claimed._ranks = ranks
                with (
                    Doer(run, deque([Deed("drain", drain, "event step", 2)]), []),
                    pytest.raises(Preempted, match=rf"node {node[:8]} is to be drained: stopped after step \d+, saved"),
                ):
                    stages.train(claimed)
        finally:
            ray.shutdown()
            cluster.shutdown()
    (preempted,) = run.events("preempted")
    assert preempted["saved_step"] == preempted["step"] < 400
    checkpoint = run.run_dir.checkpoints / store.folder_name(preempted["step"])
    assert store.newest_valid(run.run_dir.checkpoints) == checkpoint
    drill.expect_nothing_left(run)


# ------------------------------------------------------------------------------------------------------ by the command


def start_and_preempt(command: list[str], run: DrilledRun, deed: Deed) -> str:
    """Start the command and ask it to end; returns what it complained."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    done: list[Done] = []
    with Doer(run, deque([deed]), done):
        _, complaint = process.communicate(timeout=drill.PATIENCE_SECONDS)
    assert done, f"it ended before {deed}: {complaint}"
    assert process.returncode == 75, complaint
    assert not drill.processes_of(run)
    return complaint.strip()


def test_sigterm_while_ranks_start_ends_the_command_as_preempted(job: SmallJob, tmp_path: Path) -> None:
    run = job.new_run(tmp_path, NUM_STEPS)
    began = time.time()
    complaint = start_and_preempt(run.command, run, sigterm("driver", "event stage_started"))
    assert complaint == "preempted: SIGTERM; the same command goes on"
    kinds = [event["kind"] for event in run.events()]
    assert kinds.count("preempted") == 1 and not {"failed", "training_started", "run_finished"} & set(kinds)
    assert run.events("preempted")[0]["time"] - began < drill.PATIENCE_SECONDS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_in_every_stage(tmp_path: Path) -> None:
    """Raw text to an export; twice the command is told to end while it is ending."""
    path = write_config(tmp_path, checkpoint={"snapshots_in": str(tmp_path)}, evaluation={"every_steps": 2})
    runs = {name: RunDir(tmp_path / name) for name in ("run", "undisturbed")}
    commands = {name: [BROADGAUGE, "run", str(path), "--run-dir", str(run_dir.path)] for name, run_dir in runs.items()}
    run = DrilledRun(config_file.load(path), path, runs["run"])
    run.run_dir.path.mkdir()
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


def sigterm_in(stage: str):  # type: ignore[no-untyped-def]
    """Once the stage has begun."""

    def do(run: DrilledRun) -> bool:
        begun = [event["stage"] for event in run.events("stage_started")]
        pid = drill.find(run, "driver")
        if stage not in begun[-1:] or pid in (None, os.getpid()):
            return False
        os.kill(pid, signal.SIGTERM)  # type: ignore[arg-type]
        return True

    return do
