"""Megatron shards: a .bin of token ids, documents end to end, and an .idx that says how to read it.

Training needs the type of a token and the size of the .bin, and takes both from the ends of the .idx: opening a shard
costs the same for a thousand documents and for a billion.
"""

import os
import struct
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trainer.config import UserError

_IDX_MAGIC = b"MMIDIDX\x00\x00"
_IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, number of sequences, of document boundaries
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class Shard:
    """Token ids on disk, open for as long as the object lives."""

    def __init__(self, prefix: Path) -> None:
        """`prefix` names PREFIX.bin and PREFIX.idx.

        Raises:
            UserError: a file is missing or is no shard, or the two do not agree.
        """
        self.dtype, self.num_tokens = _describe(prefix)
        self._bin_path = prefix.with_name(f"{prefix.name}.bin")
        self._file = os.open(self._bin_path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, start: int, tokens: np.ndarray) -> None:
        """Fill `tokens` [n], of this shard's type, with those from `start` on. Any number of threads may read.

        By system call, not through a map: a page fault reads some 30 pages around the one that is missing, and for
        windows in shuffled order that is 30 times too much (from a cold disk a map is 24 times slower, and from the
        page cache a quarter faster; `benchmarks/reading.py`).

        Raises:
            UserError: the file ends before.
        """
        if os.preadv(self._file, [tokens.data], start * self.dtype.itemsize) != tokens.nbytes:
            raise UserError(f"{self._bin_path} has been cut off since it was opened; prepare the data again")

    def mapped(self) -> np.ndarray:
        """All token ids, for reading long pieces."""
        if self.num_tokens == 0:
            return np.zeros(0, self.dtype)  # nothing can be mapped
        return np.memmap(self._bin_path, dtype=self.dtype, mode="r").view(np.ndarray)


def count_tokens(prefix: Path) -> int:
    """Token ids in PREFIX.bin.

    Raises:
        UserError: see `Shard`.
    """
    return _describe(prefix)[1]


def _describe(prefix: Path) -> tuple[np.dtype, int]:
    idx_path, bin_path = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    try:
        with open(idx_path, "rb") as handle:
            magic, _, code, num_sequences, _ = _IDX_HEADER.unpack(handle.read(_IDX_HEADER.size))
            if magic != _IDX_MAGIC:
                raise UserError(f"{idx_path} is not a Megatron index; prepare the data again")
            if code not in _DTYPES:
                raise UserError(f"{idx_path} states the unknown token type {code}; prepare the data again")
            dtype = np.dtype(_DTYPES[code])
            stated = _bytes_stated(handle, num_sequences, dtype.itemsize)
        size = bin_path.stat().st_size
    except OSError as error:
        raise UserError(
            f"cannot read the data set {prefix}: {error.strerror}: {error.filename}; prepare it first"
        ) from error
    except struct.error as error:
        raise UserError(f"{idx_path} is not a Megatron index, or cut off; prepare the data again") from error
    if size != stated:
        raise UserError(f"{bin_path} has {size} bytes and {idx_path} states {stated}; prepare the data again")
    return dtype, size // dtype.itemsize


def _bytes_stated(idx: BinaryIO, num_sequences: int, token_bytes: int) -> int:
    """Where the last sequence ends. The index holds all lengths (int32 tokens), then all offsets (int64 bytes)."""
    if num_sequences == 0:
        return 0
    idx.seek(_IDX_HEADER.size + 4 * (num_sequences - 1))
    (length,) = struct.unpack("<i", idx.read(4))
    idx.seek(_IDX_HEADER.size + 4 * num_sequences + 8 * (num_sequences - 1))
    (offset,) = struct.unpack("<q", idx.read(8))
    return offset + length * token_bytes
