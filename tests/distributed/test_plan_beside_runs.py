"""The planner against runs of this machine: the peak of what ranks hold in use, in many layouts."""

import subprocess
import sys

import pytest

from launcher.planning.cluster import load
from launcher.planning.rank_memory import fullest
from planned_runs import ALL, config_of, in_use_bytes, measure, without_model

TOLERANCE = 0.1
FAST = {"TP2 SP", "DP2 ZeRO-2"}
CPU = load("cpu")
FORKED = """
import os
import trainer.rank
if os.fork():
    os.wait()
else:
    print(open("/proc/self/status").read(), flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    "layout", [layout if layout in FAST else pytest.param(layout, marks=pytest.mark.slow) for layout in ALL]
)
def test_memory_in_use_is_as_planned(layout: str) -> None:
    config = config_of(layout)
    memory = fullest(config, CPU).memory
    planned = memory.total - memory.context - memory.fragmentation
    assert planned == pytest.approx(in_use_bytes(config), rel=TOLERANCE)


@pytest.mark.slow
def test_a_rank_without_a_model_holds_what_is_planned_for_the_process() -> None:
    """Ranks are forked from a process that has imported all they need, and share its pages (`launcher.node`)."""
    status = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=True)
    forked = 1024 * int(status.stdout.partition("VmRSS:")[2].split()[0])
    (rank,) = measure(without_model(config_of("plain")), 2, returns_memory=False)
    grown = rank.peak_bytes - rank.before_bytes
    assert forked + grown == pytest.approx(fullest(config_of("plain"), CPU).memory.context, rel=TOLERANCE)
