"""Several Ray nodes on this machine, each of which stands in for a machine with room for one agent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from launcher.job.embedded_ray import isolated
from launcher.job.session import session

_PATIENCE_SECONDS = 60.0


class Machines:
    """A cluster to which this process is connected, by a node of its own that has no CPU to give."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Of the session."""
        self._cluster = Cluster()
        self._cluster.add_node(num_cpus=0, include_dashboard=False, node_ip_address="127.0.0.1")
        self.address: str = self._cluster.address
        ray.init(self.address, log_to_driver=False, configure_logging=False)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, **labels: str) -> str:
        """Start a node with labels of Ray, from any thread; returns a resource that it alone has."""
        name = f"machine-{len(self._processes)}"
        command = [sys.executable, __file__, self.address, name, json.dumps(labels)]
        log = open(self.folder / f"{name}.log", "wb")  # noqa: SIM115
        self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        log.close()
        return name

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not any(name in node["Resources"] for node in ray.nodes() if node["Alive"]):
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)

    def kill(self, node_id: str) -> None:
        """All processes of a machine, by Ray's name of it (hex), at once."""
        (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
        (name,) = (each for each in resources if each.startswith("machine-"))
        self._kill(self._processes[int(name.removeprefix("machine-"))])

    def name_of(self, pid: int) -> str:
        """The machine on which a process lives."""
        above = {each.pid for each in psutil.Process(pid).parents()}
        (number,) = (number for number, process in enumerate(self._processes) if process.pid in above)
        return f"machine-{number}"

    def kill_that_of(self, pid: int) -> None:
        """As `kill`: the machine on which a process lives."""
        self._kill(self._processes[int(self.name_of(pid).removeprefix("machine-"))])

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for pid in [process.pid, *(each.pid for each in family)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def end(self) -> None:
        ray.shutdown()
        for process in self._processes:
            self._kill(process)
        self._cluster.shutdown()


@contextmanager
def machines(number: int) -> Iterator[Machines]:
    with session() as folder, isolated():
        os.environ["RAY_TMPDIR"] = str(folder)  # `isolated` removes it at its end
        cluster = Machines(folder)
        try:
            for _ in range(number):
                cluster.wait_for(cluster.start())
            yield cluster
        finally:
            cluster.end()


def _be_machine(address: str, name: str, labels: str) -> None:
    """The life of a process that has started a node, whose processes the kernel ends with it."""
    from ray._private import ray_constants
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    ray_constants.ENABLE_RAY_CLUSTER = False  # or Ray puts the machine's address in the place of 127.0.0.1
    params = RayParams(
        redis_address=address,
        gcs_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=1,
        num_gpus=0,
        resources={name: 1},
        labels=json.loads(labels),
        object_store_memory=100 * 2**20,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        include_dashboard=False,
        include_log_monitor=False,
        dashboard_agent_listen_port=None,
    )
    Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
    signal.pause()


if __name__ == "__main__":
    _be_machine(*sys.argv[1:])
