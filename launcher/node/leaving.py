"""A machine that is to go away: let the run that works on it know, and wait until it has left the machine.

    python -m launcher.node.leaving RUN_DIR SECONDS

A pod's preStop hook runs this, while everything in the pod still lives. Where the driver is, it is asked to end the
run. Elsewhere Ray is told that its node here is to be drained, and the run saves, leaves the machine and goes on with
others.
Where nothing of the run is at work, as after its end, there is nothing to wait for.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.run_dir import RunDir

_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    arguments: Sequence[str]


@dataclass(frozen=True)
class RayNode:
    """Ray's part of this machine."""

    gcs_address: str
    id: str
    """Hex."""


Drain = Callable[[RayNode, float], None]
"""Tell Ray that a node will be gone in so many seconds."""


def leave(run_dir: RunDir, seconds: float, find: Callable[[], Sequence[Process]], drain: Drain) -> bool:
    """Announce it to whatever of the run is at work here; returns whether that has ended within `seconds`."""
    deadline = time.monotonic() + seconds
    found = find()
    here = _of_run(run_dir, found)
    drivers, node = [process for process in here if _is_driver(process)], ray_node(found)
    for driver in drivers:
        with suppress(ProcessLookupError):
            os.kill(driver.pid, signal.SIGTERM)
    if here and not drivers and node is not None:
        drain(node, seconds)
    while here and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        # The driver takes its request back when what the ranks have left is saved, by services after them.
        here = _of_run(run_dir, find()) or (here if run_dir.stop_path.exists() else [])
    return not here


def drain_with_ray(node: RayNode, seconds: float) -> None:
    """As `ray drain-node` does for a spot machine's notice.

    Raises:
        RuntimeError: Ray refuses.
    """
    import ray  # only where there is something to leave: it takes a second
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int((time.time() + seconds) * 1000)
    gcs = ray._raylet.GcsClient(address=node.gcs_address)
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
    is_accepted, why_not = gcs.drain_node(node.id, reason, "the pod ends", deadline_ms)
    if not is_accepted:
        raise RuntimeError(f"Ray does not drain node {node.id}: {why_not}")


def processes() -> list[Process]:
    """Those that this user may look at."""
    return list(_processes())


def ray_node(found: Sequence[Process]) -> RayNode | None:
    """By the arguments of its raylet, of which a pod has one."""
    for process in found:
        if os.path.basename(process.arguments[0]) == "raylet":
            flags = dict(each.split("=", 1) for each in process.arguments if each.startswith("--") and "=" in each)
            address, name = flags.get("--gcs-address"), flags.get("--node_id")
            return RayNode(address, name) if address and name else None
    return None


def _processes() -> Iterator[Process]:
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # gone by now
            arguments = Path("/proc", name, "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            parent = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            yield Process(int(name), int(parent), [argument.decode(errors="replace") for argument in arguments])


def _of_run(run_dir: RunDir, found: Sequence[Process]) -> list[Process]:
    """Its driver and its ranks, which are the children of fork servers: those stay warm on a machine that is left."""
    servers = {process.pid for process in found if _is_forked_or_server_of(process, run_dir)}
    return [
        process
        for process in found
        if _is_driver_of(process, run_dir) or (process.pid in servers and process.parent in servers)
    ]


def _is_driver(process: Process) -> bool:
    names = [os.path.basename(argument) for argument in process.arguments]
    return any(pair in {("broadgauge", "run"), ("broadgauge", "train")} for pair in pairwise(names))


def _is_driver_of(process: Process, run_dir: RunDir) -> bool:
    return _is_driver(process) and any(Path(each).resolve() == run_dir.path.resolve() for each in process.arguments)


def _is_forked_or_server_of(process: Process, run_dir: RunDir) -> bool:
    """By arguments, which ranks have from the server that they were forked from, and which name the run's logs."""
    return any("launcher.node.fork_server" in argument for argument in process.arguments) and any(
        f'"{run_dir.logs.resolve()}"' in argument for argument in process.arguments
    )


if __name__ == "__main__":
    folder, wait_seconds = RunDir(Path(sys.argv[1])), float(sys.argv[2])
    sys.exit(0 if leave(folder, wait_seconds, processes, drain_with_ray) else 1)
