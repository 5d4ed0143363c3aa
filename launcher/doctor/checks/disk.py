"""The disk of the run's folder: its room and its speed, against the checkpoints that the config writes there."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from launcher import memory
from launcher.doctor.checks.folders import existing
from launcher.doctor.finding import Finding, fail, ok, warn
from trainer.config import RunConfig, UserError

NAME = "disk"
_PROBE_BYTES = 256 << 20
_PROBE_SECONDS = 3.0  # each for writing and reading; slow disks get less to do
_PIECE_BYTES = 16 << 20
_SLOW_BYTES_PER_SECOND = 100e6  # a single hard disk does better
_LITTLE_BYTES = 10 * 10**9


@dataclass(frozen=True)
class Disk:
    folder: str
    free_bytes: int
    write_bytes_per_second: float
    """Until the disk has it."""
    read_bytes_per_second: float
    """Past the page cache, where that is possible."""


def measure(folder: Path, num_bytes: int = _PROBE_BYTES, seconds: float = _PROBE_SECONDS) -> Disk:
    """Write so much, or as much as the time allows, and read it again. The file has no name and is gone with us.

    Raises:
        UserError: nothing can be written there.
    """
    there = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there, buffering=0) as file, mmap.mmap(-1, _PIECE_BYTES) as piece:
            status = os.fstatvfs(file.fileno())
            piece.write(os.urandom(_PIECE_BYTES))  # nothing that a disk could compress
            descriptor = _past_the_cache(file.fileno())
            try:
                written, write_seconds = _timed(lambda place: _write(descriptor, piece, place), num_bytes, seconds)
                with suppress(OSError):  # where writes went through the cache
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                read, read_seconds = _timed(lambda place: os.preadv(descriptor, [piece], place), written, seconds)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"{there}: nothing can be written there ({error.strerror or error}); make room, make it writable, or use "
            "another --run-dir"
        ) from error
    return Disk(str(folder), status.f_frsize * status.f_bavail, written / write_seconds, read / read_seconds)


def judge(found: Disk, config: RunConfig | None) -> Finding:
    """Room for the checkpoints that are kept and the one being written; speed to save one when preempted."""
    measured = (
        f"{found.folder}: {decimal(found.free_bytes)} free, writes {decimal(int(found.write_bytes_per_second))}/s, "
        f"reads {decimal(int(found.read_bytes_per_second))}/s"
    )
    elsewhere = "use another --run-dir"
    if config is None:
        if found.free_bytes < _LITTLE_BYTES:
            return warn(NAME, f"{measured}; 10 GB are little", f"make room, or {elsewhere}")
        slow = found.write_bytes_per_second < _SLOW_BYTES_PER_SECOND
        return warn(NAME, f"{measured}; a hard disk does 100 MB/s", elsewhere) if slow else ok(NAME, measured)
    size, saving = memory.checkpoint_bytes(config), config.checkpoint
    num_kept = saving.keep_last + saving.keep_best + 1
    seconds = size / config.launch.nodes / found.write_bytes_per_second
    measured += f"; a checkpoint takes {decimal(size)} and {seconds:.2g} s"
    if found.free_bytes < num_kept * size:
        return fail(
            NAME,
            f"{measured}, and {num_kept} of them must fit ({decimal(num_kept * size)})",
            f"make room, lower checkpoint.keep_last, or {elsewhere}",
        )
    if seconds > saving.grace_seconds:
        return warn(
            NAME,
            f"{measured}, more than checkpoint.grace_seconds {saving.grace_seconds:g}: a preempted run loses steps",
            f"use a faster disk ({elsewhere}), or set checkpoint.snapshot_every_steps",
        )
    return ok(NAME, measured)


def _past_the_cache(descriptor: int) -> int:
    """Another descriptor of the file that goes to the disk at once, where the file system knows such ones."""
    path = f"/proc/self/fd/{descriptor}"
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDWR)


def _write(descriptor: int, piece: mmap.mmap, place: int) -> int:
    num_bytes = os.pwrite(descriptor, piece, place)
    os.fdatasync(descriptor)
    return num_bytes


def _timed(move: Callable[[int], int], num_bytes: int, seconds: float) -> tuple[int, float]:
    """(bytes, seconds) of moving so many piece by piece, and no more pieces when the time is up."""
    began, place = time.perf_counter(), 0
    while place < num_bytes and time.perf_counter() - began < seconds:
        moved = move(place)
        if moved <= 0:
            raise OSError(f"the disk does not go on at byte {place}")
        place += moved
        if moved % mmap.PAGESIZE:  # of a disk that is full: the next direct write could not begin here
            break
    return place, time.perf_counter() - began
