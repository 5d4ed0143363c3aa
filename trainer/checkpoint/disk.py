"""Copying snapshots to disk: past the page cache where that is possible, and read back from the disk to be checked."""

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import xxhash

from trainer.checkpoint.chunk_file import PAGE_BYTES

_PIECE_BYTES = 8 << 20


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file; on return the disk has it.

    A copy of many gigabytes through the page cache would drive out what the data pipeline and other jobs have there,
    and is slower.

    Raises:
        OSError: the disk is full, or does not let us write.
    """
    size = source.stat().st_size
    with open(source, "rb") as file:
        memory = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) if size else None
    descriptor, is_direct = _open_direct(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        _reserve(descriptor, size)
        if memory is not None:
            with memory, memoryview(memory) as view:
                _write_all(descriptor, view, size, is_direct)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """See that the disk is full before the time is spent, where the file system can tell."""
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _write_all(descriptor: int, view: memoryview, size: int, is_direct: bool) -> None:
    """Direct writes are of whole pages, from whole pages: the end of the last one is zeros, and cut off afterwards."""
    whole = size - size % PAGE_BYTES if is_direct else size
    position = 0
    while position < whole:
        position += os.pwrite(descriptor, view[position : min(position + _PIECE_BYTES, whole)], position)
    if position < size:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            page[: size - position] = view[position:size]
            os.pwrite(descriptor, page, position)


def fingerprint_on_disk(path: Path) -> list[Any]:
    """[bytes, xxh3-128 in hex], like `fingerprint`, of what the disk holds, not of what the page cache remembers."""
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    descriptor, _ = _open_direct(path, os.O_RDONLY)
    position = 0
    try:
        with mmap.mmap(-1, _PIECE_BYTES) as piece, memoryview(piece) as view:
            while position < size:
                got = os.preadv(descriptor, [view], position)
                if not got:
                    break
                digest.update(view[: min(got, size - position)])
                position += got
    finally:
        os.close(descriptor)
    return [min(position, size), digest.hexdigest()]


def _open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor that passes the page cache by, and whether it does: some file systems cannot."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644), True
    except OSError:
        return os.open(path, flags, 0o644), False


def reason_of(error: OSError) -> str:
    """One line for a person."""
    what = error.strerror or str(error)
    return f"{what}: {error.filename}" if error.filename else what
