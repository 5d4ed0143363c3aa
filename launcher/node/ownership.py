"""Who may write into a run folder: the processes of one job, never those of a job that was killed a moment ago.

A job claims a lock file by writing its id into it while nobody holds it. Its fork servers hold the file shared and
their ranks inherit that hold, so the kernel ends it with the last of them, however they end. A fork server of an
older job that wakes up late finds another id in the file and leaves.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".ranks.lock"
"""Of the lock file in a run's folder."""

_POLL_SECONDS = 0.01


def claim(path: Path, job_id: str, timeout_seconds: float) -> None:
    """Write `job_id` into the lock file as soon as no process of an earlier job holds it.

    Raises:
        TimeoutError: somebody still holds it after `timeout_seconds`.
    """
    with _exclusive(path, timeout_seconds) as descriptor:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, job_id.encode(), 0)


def wait_until_free(path: Path, timeout_seconds: float) -> None:
    """Return when every process that held the file has ended.

    Raises:
        TimeoutError: somebody still holds it after `timeout_seconds`.
    """
    with _exclusive(path, timeout_seconds):
        pass


def hold(path: Path, job_id: str) -> int | None:
    """Hold the file for this process and all that it forks from now on; None if it is another job's by now."""
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.pread(descriptor, 256, 0).decode() == job_id:
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def held(path: Path, job_id: str) -> Iterator[bool]:
    """As `hold`, for a while; says whether the file is the job's."""
    descriptor = hold(path, job_id)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _exclusive(path: Path, timeout_seconds: float) -> Iterator[int]:
    deadline = time.monotonic() + timeout_seconds
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"processes of an earlier job still hold {path} after {timeout_seconds:g} s; "
                    f"end them (`fuser -k {path}`) and run again"
                )
            time.sleep(_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
