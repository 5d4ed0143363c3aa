"""Latency and bandwidth, judged; and two processes that meet, or do not."""

import pytest

from launcher.doctor import loopback
from launcher.doctor.checks.network import Backend, Network, judge
from launcher.doctor.guard import Check, outcome
from trainer.config_file import from_tree


@pytest.mark.parametrize(
    ("backend", "is_loopback", "latency_us", "gigabytes", "verdict"),
    [
        ("gloo", False, 100, 1.2, "ok"),
        ("gloo", False, 100, 0.1, "warn"),  # 1 Gbit/s Ethernet
        ("gloo", False, 5000, 1.2, "warn"),
        ("gloo", True, 150, 0.5, "ok"),
        ("gloo", True, 150, 0.2, "warn"),
        ("nccl", False, 30, 40.0, "ok"),
        ("nccl", False, 30, 1.2, "warn"),  # over the wrong interface
    ],
)
def test_thresholds(backend: Backend, is_loopback: bool, latency_us: float, gigabytes: float, verdict: str) -> None:
    found = judge(Network(2, backend, is_loopback, latency_us * 1e-6, gigabytes * 1e9))
    assert found.verdict == verdict and bool(found.fix) == (verdict == "warn")


def test_what_is_said_has_units() -> None:
    found = judge(Network(4, "gloo", False, 123e-6, 1.25e9))
    assert found.measured == "4 ranks on as many machines (gloo): 123 us for 8 bytes, 1.2 GB/s for 64 MB"


def test_processes_that_cannot_meet_fail() -> None:
    config = from_tree({"launch": {"env": {"GLOO_SOCKET_IFNAME": "nowhere0"}}})
    found = outcome(Check("network", 60.0, lambda: judge(loopback.measure(config)), ""))
    assert found.verdict == "fail"
    assert found.measured.startswith("two processes of this machine have not met over loopback (")
    assert "nowhere0" in found.measured and "launch.env" in found.fix
