"""The time and place of a job on this machine: a private folder, and a reaper that ends it when the driver ends.

However the driver ends: the reaper is a process of its own, sees the end of the driver by the closing of a pipe,
kills every process that was started in the session and removes the folder. Ray's own arrangements for a killed
driver leave two of its helpers running for a minute.

The reaper runs this file as a script, apart from any package, so that it starts in milliseconds.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MARK = "BROADGAUGE_SESSION"
_LONGEST_TEMP_DIR = 30  # characters; Ray adds about 65 for its sockets, and the kernel allows 107
_REAPING_SECONDS = 20.0
_MEMORY = Path("/dev/shm")


@contextmanager
def session() -> Iterator[Path]:
    """A private folder with a short path; processes started from now on are gone, and so is the folder, at the end."""
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="broadgauge-", dir=parent if len(parent) <= _LONGEST_TEMP_DIR else "/tmp")
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, folder], stdin=subprocess.PIPE, start_new_session=True
    )
    marks = {_MARK: folder, "SPT_NOENV": "1"}  # the second has Ray's processes keep it when they change their titles
    before = {name: os.environ[name] for name in marks if name in os.environ}  # of a session around this one
    os.environ.update(marks)
    try:
        yield Path(folder)
    finally:
        for name in marks:
            del os.environ[name]
        os.environ.update(before)
        reaper.communicate(timeout=2 * _REAPING_SECONDS)


def memory_folder(folder: Path, job_id: str) -> Path:
    """Of a job of the session, on every machine: in memory, and on this one gone with the session."""
    parent = _MEMORY if _MEMORY.is_dir() else folder
    return parent / f"{folder.name}-{job_id}"


def _reap(folder: str) -> None:
    """The whole life of the reaper."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # ends when the driver closes it, or the kernel does
    deadline = time.monotonic() + _REAPING_SECONDS
    while (marked := _processes_of(folder)) and time.monotonic() < deadline:
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)
    for path in _MEMORY.glob(f"{Path(folder).name}-*"):
        shutil.rmtree(path, ignore_errors=True)


def _processes_of(folder: str) -> list[int]:
    """Processes that were started with the session's mark in their environment."""
    mark = f"{_MARK}={folder}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone by now, or another user's
            if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


if __name__ == "__main__":
    _reap(sys.argv[1])
