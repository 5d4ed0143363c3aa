"""Files that are there whole or not at all: written beside their place, synced, renamed, the folder synced."""

import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


def temporary_path(path: Path) -> Path:
    """Where a file or folder lies until it is whole."""
    return path.with_name(f"{path.name}.tmp")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it; not atomic."""
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    write_synced(temporary_path(path), data)
    publish(path)


def publish(path: Path) -> None:
    """Move what was written and synced at `temporary_path(path)` to its place.

    A folder replaces an older one in two moves, so a crash may leave neither: callers commit to a set of files by
    writing its manifest last.
    """
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary_path(path), path)
    sync_folder(path.parent)


def discard(path: Path) -> None:
    """Remove what lies at `temporary_path(path)`, if anything does."""
    temporary = temporary_path(path)
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(source: Path, target: Path) -> None:
    """Give a folder whose files lie finished its name, after everything in it is on the disk.

    An older folder of that name goes first, so a crash may leave neither.
    """
    for path in [*source.rglob("*"), source]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if target.exists():
        shutil.rmtree(target)
    os.rename(source, target)
    sync_folder(target.parent)


def write_npy_header(handle: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """At the beginning of a file whose rows are streamed: numpy leaves room for their number to grow."""
    handle.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(handle, header)


def zeros_on_disk(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    """[length] A new file of zeros (one at least), mapped. Its space is taken at once: a page that finds the disk full
    when it is written would end the process, with no word.

    Raises:
        OSError: there is no room.
    """
    with open(path, "wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(1, length) * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=(max(1, length),))
