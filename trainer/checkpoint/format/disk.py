"""Copying snapshots to disk: past the page cache where that is possible, and read back from the disk to be checked."""

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import xxhash

from trainer.checkpoint.format.chunk_file import PAGE_BYTES

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
        with view[position : min(position + _PIECE_BYTES, whole)] as piece:  # let go of, also where this fails
            num_bytes = os.pwrite(descriptor, piece, position)
        position += _progress(num_bytes, position, whole, is_direct)
    if position < size:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            page[: size - position] = view[position:size]
            if os.pwrite(descriptor, page, position) < size - position:
                raise OSError(errno.EIO, f"the disk took only part of the bytes from {position} on")


def fingerprint_on_disk(path: Path) -> list[Any]:
    """[bytes, xxh3-128 in hex], like `fingerprint`, of what the disk holds, not of what the page cache remembers.

    Raises:
        OSError: the disk does not give it back.
    """
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    descriptor, is_direct = _open_direct(path, os.O_RDONLY)
    position = 0
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # where reads cannot pass the page cache by
        with mmap.mmap(-1, _PIECE_BYTES) as piece, memoryview(piece) as view:
            while position < size:
                got = min(os.preadv(descriptor, [view], position), size - position)
                got = _progress(got, position, size, is_direct)
                digest.update(view[:got])
                position += got
    finally:
        os.close(descriptor)
    return [position, digest.hexdigest()]


def _progress(num_bytes: int, position: int, end: int, is_direct: bool) -> int:
    """How much of what was moved counts: the next direct read or write must begin at a page again.

    Raises:
        OSError: none of it.
    """
    if is_direct and position + num_bytes < end:
        num_bytes -= num_bytes % PAGE_BYTES
    if num_bytes <= 0:
        raise OSError(errno.EIO, f"the disk does not go on at byte {position} of {end}")
    return num_bytes


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
