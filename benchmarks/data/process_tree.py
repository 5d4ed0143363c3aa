"""What a command costs: wall and processor seconds, and the memory of it and all its descendants."""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Cost:
    wall_seconds: float
    cpu_seconds: float
    """Of the command and of every descendant that was waited for, or as sampled where that is more."""
    peak_tree_mb: float
    """The most that all processes held at once: sum of their PSS (a shared page counts once), sampled."""
    peak_process_mb: float
    """The most that one process ever held (VmHWM: shared pages count whole)."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Raises:
    RuntimeError: the command fails; with the end of what it printed.
    """
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        watch = _MemoryWatch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall_seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.stop()
        if process.returncode:
            output.seek(0)
            tail = output.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    cpu_seconds = max(usage.ru_utime + usage.ru_stime, sum(watch.cpu_seconds.values()))
    return Cost(wall_seconds, cpu_seconds, watch.peak_tree_bytes / 1e6, watch.peak_process_bytes / 1e6)


class _MemoryWatch:
    """Samples a process and its descendants from a thread of its own."""

    def __init__(self, pid: int) -> None:
        self.peak_tree_bytes = 0
        self.peak_process_bytes = 0
        self.cpu_seconds: dict[int, float] = {}
        """Of every process, as it was seen last."""
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            try:
                root = psutil.Process(self._pid)
                processes = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    self.cpu_seconds[process.pid] = sum(process.cpu_times()[:2])
            samples = [_memory(process.pid) for process in processes]
            self.peak_tree_bytes = max(self.peak_tree_bytes, sum(pss for pss, _ in samples))
            self.peak_process_bytes = max(self.peak_process_bytes, *(peak for _, peak in samples))


def _memory(pid: int) -> tuple[int, int]:
    """PSS now and the peak of resident memory, in bytes; zeros of a process that has ended."""
    try:
        return _field(pid, "smaps_rollup", "Pss:"), _field(pid, "status", "VmHWM:")
    except OSError:
        return 0, 0


def _field(pid: int, file: str, name: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
