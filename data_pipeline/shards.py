"""Megatron shards: a .bin of token ids, documents one after another, and a .idx that says where each one lies.

The .idx, little-endian: magic, version (u64), code of the token type (u8), number of sequences (u64), number of
document boundaries (u64), then lengths in tokens (i32 each), offsets in bytes (i64 each), boundaries (i64 each).
Here every document is one sequence that ends in the end-of-text token.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import discard, publish, temporary_path, write_synced

TokenIds = NDArray[np.integer[Any]]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_MAX_UINT16_VOCAB = 65500  # Megatron's own bound, a little below 2^16
_TYPE_CODES: dict[np.dtype[np.integer[Any]], int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype[np.integer[Any]]:
    """The smallest type that Megatron uses for a vocabulary of this size."""
    return np.dtype(np.uint16) if vocab_size < _MAX_UINT16_VOCAB else np.dtype(np.int32)


class ShardWriter:
    """Streams documents into `<prefix>.bin`; nothing lies under that name, nor the index's, until `commit`."""

    def __init__(self, prefix: Path, vocab_size: int, end_of_text_id: int) -> None:
        self.bin_path = prefix.with_name(f"{prefix.name}.bin")
        self.idx_path = prefix.with_name(f"{prefix.name}.idx")
        self.num_documents = 0
        self.num_tokens = 0
        self._dtype = token_dtype(vocab_size)
        self._end_of_text = np.array([end_of_text_id], dtype=self._dtype)
        self._lengths: list[NDArray[np.int32]] = []
        self._bin = open(temporary_path(self.bin_path), "wb")  # noqa: SIM115  (closed by finish or discard)

    def add(self, documents: Sequence[TokenIds]) -> None:
        """Append documents (token ids each, `[length]`), each followed by one end-of-text token."""
        if not documents:
            return
        lengths = np.array([len(tokens) + 1 for tokens in documents], dtype=np.int32)
        tokens = np.concatenate([part for tokens in documents for part in (tokens, self._end_of_text)])
        self._bin.write(tokens.astype(self._dtype, casting="safe", copy=False).data)
        self._lengths.append(lengths)
        self.num_documents += len(documents)
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Make both files whole and synced, still under their temporary names."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        write_synced(temporary_path(self.idx_path), self._index())

    def commit(self) -> None:
        """Give both files, once finished, their names."""
        publish(self.bin_path)
        publish(self.idx_path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Leave no trace; does nothing after `commit`."""
        self._bin.close()
        for path in (self.bin_path, self.idx_path):
            discard(path)

    def _index(self) -> bytes:
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        offsets = np.concatenate([[0], ends[:-1]]).astype("<i8")[: len(lengths)]
        boundaries = np.arange(len(lengths) + 1, dtype="<i8")
        header = struct.pack("<QBQQ", _VERSION, _TYPE_CODES[self._dtype], len(lengths), len(boundaries))
        return b"".join([_MAGIC, header, lengths.astype("<i4").tobytes(), offsets.tobytes(), boundaries.tobytes()])
