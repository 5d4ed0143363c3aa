"""CPU runs are planned on the machine they will run on."""

import os
from pathlib import Path

import pytest

from launcher.planning import this_machine
from launcher.planning.cluster import load

CORE = load("cpu")


@pytest.mark.parametrize(
    ("ranks", "cores", "threads", "share"),
    [(2, 2, None, 1.0), (4, 2, None, 0.5), (1, 8, None, 8.0), (1, 8, 1, 1.0), (4, 2, 1, 0.5), (2, 16, 4, 4.0)],
)
def test_ranks_share_cores_and_use_no_more_than_their_threads(
    ranks: int, cores: int, threads: int | None, share: float
) -> None:
    found = this_machine.shared_by(ranks, cores, 16e9, threads)
    assert found.devices_per_node == ranks
    assert found.memory_bytes == 16e9 / ranks
    assert found.fp32_flops == pytest.approx(CORE.fp32_flops * share)
    assert found.memory_bytes_per_second == pytest.approx(CORE.memory_bytes_per_second * share)
    assert found.link_latency_seconds == pytest.approx(CORE.link_latency_seconds / min(1.0, share))


def test_a_plan_is_for_the_cores_that_may_be_used() -> None:
    found = this_machine.cpu_cluster(1)
    assert found.kind == "cpu"
    assert found.fp32_flops == pytest.approx(CORE.fp32_flops * len(os.sched_getaffinity(0)))


def test_a_containers_limit_counts_where_it_is_below_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [tmp_path / name for name in ("new", "old", "missing")]
    monkeypatch.setattr(this_machine, "_MEMORY_LIMITS", limits)
    limits[0].write_text("max\n")
    limits[1].write_text(f"{2**62}\n")
    machine = this_machine.memory_bytes()
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits[0].write_text(f"{2**28}\n")
    assert this_machine.memory_bytes() == 2**28


@pytest.mark.parametrize(
    ("flags", "speedup"),
    [("fpu avx2", 0.5), ("fpu avx512_bf16 sse", 4.4), ("avx512_bf16 amx_bf16", 8.0)],
)
def test_bf16_is_as_fast_as_the_cores_instructions_make_it(
    flags: str, speedup: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
    monkeypatch.setattr(this_machine, "_CPUINFO", cpuinfo)
    assert this_machine.bf16_speedup() == speedup
