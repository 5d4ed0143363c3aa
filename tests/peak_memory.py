"""How much memory some work needs at its peak."""

import os
from collections.abc import Callable
from pathlib import Path


def peak_growth_mb(work: Callable[[], object]) -> float:
    """By how much a forked child's resident memory grows at its peak."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
            before = _peak_kb()
            work()
            os.write(writable, str(_peak_kb() - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writable)
    with open(readable, "rb") as handle:
        return int(handle.read()) / 1024


def _peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
