"""Whether machines have the memory that a run takes, before anything is started: one answer for whoever asks.

On GPUs the fullest rank must fit its device, by the plan, and what is kept in the machine's memory must fit that:
offloaded state, and a snapshot. On CPUs ranks share the machine's memory with each other and with snapshots.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import NoReturn

from launcher import memory
from launcher.placement import ACCELERATOR, Machine, Placement, place, usable
from launcher.planning import cluster as clusters
from launcher.planning.advice import roomier
from launcher.planning.cluster import Cluster
from launcher.planning.rank_memory import fullest, rank_memory
from launcher.planning.recognition import cluster_of
from trainer.config import RunConfig, UserError

OnShortage = Callable[[str], object]
"""Hears in one line why a run does not fit."""

_GIB = 2**30
_log = logging.getLogger(__name__)


def refuse(shortage: str) -> NoReturn:
    """Raises:
    UserError: always; the other way to take a shortage is to warn of it.
    """
    raise UserError(f"{shortage}, and --force goes on all the same")


def check_memory(config: RunConfig, machines: Sequence[Machine], on_shortage: OnShortage = refuse) -> None:
    """Have `on_shortage` told why the run cannot fit, if it cannot.

    A fault of the plan keeps no run from being tried.

    Raises:
        UserError: the cluster is too small, `launch.cluster` is wrong, or what `on_shortage` raises.
    """
    where = place(config, machines)
    candidates = usable(config, where, machines)
    names = {each.labels.get(ACCELERATOR, "") for each in candidates}
    try:
        found = shortage(config, where, candidates, cluster_of(config, names, on_gpus=where.gpus_per_node > 0))
    except UserError:
        raise
    except Exception:
        _log.warning("whether the run fits could not be told", exc_info=True)
        return
    if found is not None:
        on_shortage(found)


def shortage(config: RunConfig, where: Placement, machines: Sequence[Machine], known: Cluster | None) -> str | None:
    """One line: what is needed of what, what there is, and the way out; None where there is enough."""
    if where.gpus_per_node == 0:
        return _shortage_of_machines(config, _on_cpus(config), where, machines, "more machines, or a smaller model")
    if known is not None and (short := shortage_of_devices(config, known)) is not None:
        return short
    kept = {"offloaded state and a snapshot": float(memory.least_host_bytes(config))}
    return _shortage_of_machines(config, kept, where, machines, "more machines, or a smaller model")


def shortage_of_devices(config: RunConfig, cluster: Cluster) -> str | None:
    """On GPUs of a cluster, whichever machines there are."""
    parts = asdict(fullest(config, cluster).memory)
    need = sum(parts.values())
    if need <= cluster.memory_bytes:
        return None
    return (
        f"the fullest rank takes {need / _GIB:.1f} GiB ({_listed(parts)}), and each {cluster.device} has "
        f"{cluster.memory_bytes / _GIB:.1f} GiB; {_way_out(config, 'more parallel.tensor or parallel.pipeline')}"
    )


def least_bytes(config: RunConfig, *, on_gpus: bool) -> float:
    """Of the memory of each machine."""
    return memory.least_host_bytes(config) if on_gpus else sum(_on_cpus(config).values())


def _on_cpus(config: RunConfig) -> Mapping[str, float]:
    """What the fullest machine holds, by part: its ranks, whose stages hold differently much, and snapshots."""
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"device": "cpu"})})  # if it is auto
    cpu = clusters.load("cpu")
    of_stage = [asdict(rank_memory(config, cpu, stage)) for stage in range(config.parallel.pipeline)]
    machines = []
    for stages in memory.stages_of_machines(config):
        held: Counter[str] = Counter()
        for stage in stages:
            held.update(of_stage[stage])
        machines.append(held)
    largest = max(machines, key=lambda held: sum(held.values()))
    return {**largest, "snapshots": memory.snapshots_bytes(config)}


def _shortage_of_machines(
    config: RunConfig, parts: Mapping[str, float], where: Placement, machines: Sequence[Machine], rest: str
) -> str | None:
    wanted, need = where.nodes + config.launch.spares, sum(parts.values())
    have = sorted((machine.resources.get("memory", math.inf) for machine in machines), reverse=True)
    if have[wanted - 1] >= need:
        return None
    return (
        f"{where.ranks_per_node} rank(s) take {need / _GIB:.1f} GiB of memory on each of {wanted} machine(s) "
        f"({_listed(parts)}), and there are {', '.join(f'{each / _GIB:.1f}' for each in have)} GiB; "
        f"{_way_out(config, rest)}"
    )


def _listed(parts: Mapping[str, float]) -> str:
    """The largest first; those that are nothing beside them are left out."""
    shown = sorted(parts.items(), key=lambda part: -part[1])
    whole = sum(parts.values())
    return ", ".join(f"{name} {value / _GIB:.1f}" for name, value in shown if value >= 0.01 * whole)


def _way_out(config: RunConfig, rest: str) -> str:
    return f"try {', '.join([*roomier(config), rest])}; `broadgauge plan CONFIG --search` looks for a layout"
