"""How fast ranks reach each other: an all-reduce of 8 bytes for the latency, and one of 64 MB for the bandwidth.

Run as a program it is one rank of two on this machine.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.filesize import decimal

from launcher.doctor.finding import Finding, ok, warn

if TYPE_CHECKING:
    import torch

NAME = "network"
Backend = Literal["gloo", "nccl"]

TIMEOUT_SECONDS = 20.0  # for ranks to meet, and of an operation
_SMALL_BYTES, _LARGE_BYTES = 8, 64 << 20
_NUM_SMALL, _NUM_LARGE = 200, 5
_LARGE_SECONDS = 2.0  # where the network is slow, fewer are done
_SLOWEST_SECONDS = 1e-3  # TCP within a datacenter takes some 0.1 ms; more is another zone, a VPN or Wi-Fi
_LEAST_BYTES_PER_SECOND = {
    "loopback": 0.3e9,  # two processes on two cores of a laptop do more
    "gloo": 0.6e9,  # half of 10 Gbit/s Ethernet; below, the gradients of 125M parameters (0.5 GB) take a second
    "nccl": 6e9,  # half of 100 Gbit/s; below, those of 1.3B parameters (5.2 GB) take a second
}


@dataclass(frozen=True)
class Network:
    num_ranks: int
    backend: Backend
    is_loopback: bool
    """All on one machine."""
    latency_seconds: float
    """Median of an all-reduce of 8 bytes."""
    bus_bytes_per_second: float
    """Of one of 64 MB, as nccl-tests counts it (doc/PERFORMANCE.md): what crosses every link, 2 (n - 1) / n times the
    size for n ranks, whatever their number."""


def measure(rank: int, num_ranks: int, rendezvous: str, backend: Backend, *, is_loopback: bool) -> Network:
    """Be one of the ranks, all of which must call this; every one returns what it has seen."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend,
        init_method=rendezvous,
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        small, large = (torch.zeros(size // 4, device=device) for size in (_SMALL_BYTES, _LARGE_BYTES))
        for _ in range(10):
            _reduce(small)
        latency_seconds = statistics.median(_reduce(small) for _ in range(_NUM_SMALL))
        first = torch.tensor([_reduce(large)], device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MAX)  # so that all do the same number
        repeats = max(1, min(_NUM_LARGE, int(_LARGE_SECONDS / float(first))))
        large_seconds = statistics.median(_reduce(large) for _ in range(repeats))
        dist.barrier()  # a rank that leaves early tears connections down under the others
    finally:
        dist.destroy_process_group()
    moved = 2 * (num_ranks - 1) / num_ranks * _LARGE_BYTES
    return Network(num_ranks, backend, is_loopback, latency_seconds, moved / large_seconds)


def _reduce(tensor: "torch.Tensor") -> float:
    """Seconds of one all-reduce, until the result is there."""
    import torch
    import torch.distributed as dist

    began = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def judge(found: Network) -> Finding:
    where = "on this machine" if found.is_loopback else "on as many machines"
    measured = (
        f"{found.num_ranks} ranks {where} ({found.backend}): {found.latency_seconds * 1e6:,.0f} us for 8 bytes, "
        f"{decimal(int(found.bus_bytes_per_second))}/s for 64 MB"
    )
    kind = "loopback" if found.is_loopback and found.backend == "gloo" else found.backend
    least = _LEAST_BYTES_PER_SECOND[kind]
    busy = "see what else this machine is doing" if found.is_loopback else ""
    if found.bus_bytes_per_second < least:
        fix = busy or "see that ranks use the fast interface (launch.env: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        return warn(NAME, f"{measured}; below {decimal(int(least))}/s gradients hold up every step", fix)
    if found.latency_seconds > _SLOWEST_SECONDS:
        fix = busy or "use machines in one zone and placement group, and no VPN between them"
        return warn(NAME, f"{measured}; more than 1 ms is a long way", fix)
    return ok(NAME, measured)


def main(arguments: list[str]) -> None:
    rank, num_ranks, rendezvous, backend, result = arguments
    assert backend in ("gloo", "nccl")
    kind: Backend = "nccl" if backend == "nccl" else "gloo"
    if kind == "nccl":
        import torch

        torch.cuda.set_device(int(rank))
    found = measure(int(rank), int(num_ranks), rendezvous, kind, is_loopback=True)
    if rank == "0":
        Path(result).write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
