"""A Ray node that is to be drained: what comes with a spot machine's notice ends the run as preempted."""

import os
import time
from collections import deque
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

import drill
from deeds import Deed, Doer
from drilled_run import DrilledRun, SmallJob, expect_nothing_left
from launcher.job import ranks as jobs
from launcher.job.embedded_ray import isolated
from launcher.job.fleet import fleet_of
from launcher.job.ranks import Ranks
from launcher.job.session import session
from launcher.node import ownership
from launcher.verbs import stages
from trainer.checkpoint.format import store
from trainer.stop import Preempted


@pytest.mark.slow
def test_a_node_that_ray_is_to_drain_ends_the_run(small_job: SmallJob, tmp_path: Path) -> None:
    run = small_job.new_run(tmp_path, num_steps=400)
    with session() as folder, isolated(), drill.claimed(run) as claimed:
        os.environ["RAY_TMPDIR"] = str(folder)  # `isolated` removes it at its end
        cluster = Cluster()
        try:
            for num_cpus in (0, 1):  # the driver's, and that of the ranks; Ray ends a drained one, and its drivers
                cluster.add_node(num_cpus=num_cpus, include_dashboard=False, node_ip_address="127.0.0.1")
            ray.init(cluster.address, log_to_driver=False, configure_logging=False)
            new_job = jobs.new_job(run.config, run.run_dir, folder)
            ownership.claim(new_job.lock, new_job.id, drill.PATIENCE_SECONDS)
            gcs = GcsClient(address=cluster.address)
            (node,) = (each["NodeID"] for each in ray.nodes() if "CPU" in each["Resources"])

            def drain(_: DrilledRun) -> bool:
                """As `ray drain-node` does, which takes 127.0.0.1 for another address of the machine."""
                deadline_ms = time.time_ns() // 1_000_000 + 60_000
                preemption = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
                is_accepted, why_not = gcs.drain_node(node, preemption, "drill", deadline_ms)
                assert is_accepted, why_not
                return True

            with fleet_of(new_job, folder) as fleet:
                claimed._ranks = Ranks(fleet)
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
    expect_nothing_left(run)
