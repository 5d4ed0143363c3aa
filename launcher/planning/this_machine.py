"""The machine that a command runs on, as a cluster for runs on its CPUs."""

import os
from contextlib import suppress
from pathlib import Path

from launcher.planning.cluster import Cluster, load

_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Of a container, in cgroups of either version; one that says `max`, or more than there is, limits nothing."""
_CPUINFO = Path("/proc/cpuinfo")
_BF16_SPEEDUPS = {"amx_bf16": 8.0, "avx512_bf16": 4.4}
"""Of matrix products over fp32, by a core's instructions; the second measured, the first a guess."""


def cpu_cluster(ranks: int, threads_per_rank: int | None = None) -> Cluster:
    """As many devices as `ranks`, which share the machine's cores and memory evenly; `cpu.yaml` has a core's speed."""
    found = shared_by(ranks, num_cores(), memory_bytes(), threads_per_rank)
    return found.model_copy(update={"bf16_flops": found.fp32_flops * bf16_speedup()})


def shared_by(ranks: int, cores: int, memory_bytes: float, threads_per_rank: int | None = None) -> Cluster:
    """A machine of `cores` cores among `ranks`: each has its share of them, and no more than it has threads.

    A rank of `cpu.yaml` is one core. Ranks that outnumber cores take turns, those that wait for messages too.
    """
    core = load("cpu")
    share = cores / ranks
    if threads_per_rank is not None:
        share = min(share, threads_per_rank)
    scaled = (
        "bf16_flops",
        "fp32_flops",
        "memory_bytes_per_second",
        "host_link_bytes_per_second",
        "host_memory_bytes_per_second",
        "link_bytes_per_second",
    )
    changes = {name: getattr(core, name) * share for name in scaled}
    return core.model_copy(
        update={
            **changes,
            "device": f"CPU ({share:.3g} core{'' if share == 1 else 's'} a rank)",
            "link_latency_seconds": core.link_latency_seconds / min(1.0, share),
            "memory_bytes": memory_bytes / ranks,
            "devices_per_node": ranks,
        }
    )


def bf16_speedup() -> float:
    """Of matrix products in bf16 over fp32, by the instructions that this machine's cores have."""
    core = load("cpu")
    try:
        flags = set(_CPUINFO.read_text(encoding="utf-8").partition("\nflags")[2].partition("\n")[0].split())
    except OSError:
        flags = set()
    known = (speedup for name, speedup in _BF16_SPEEDUPS.items() if name in flags)
    return next(known, core.bf16_flops / core.fp32_flops)


def num_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> float:
    """Of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [total]
    for path in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):
            limits.append(int(path.read_text(encoding="ascii")))
    return float(min(limits))
