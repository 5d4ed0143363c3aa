"""Megatron shards: a .bin of token ids, documents one after another, and a .idx that says where each one lies.

The .idx, little-endian: magic, version (u64), code of the token type (u8), number of sequences (u64), number of
document boundaries (u64), then lengths in tokens (i32 each), offsets in bytes (i64 each), boundaries (i64 each).
Here every document is one sequence that ends in the end-of-text token.

Shapes: `n` tokens, `d` documents.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import discard, publish, temporary_path
from trainer.section import UserError

TokenIds = NDArray[np.integer[Any]]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<QBQQ")
_MAX_UINT16_VOCAB = 65500  # Megatron's own bound, a little below 2^16
_TYPE_CODES: dict[np.dtype[np.integer[Any]], int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max - 1  # the .idx counts in int32, the end-of-text token included
_BLOCK_DOCUMENTS = 1 << 17  # of an index written at a time: a few MB
_COPY_BYTES = 1 << 20
_CANNOT_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # another file system, a pipe, ...


def token_dtype(vocab_size: int) -> np.dtype[np.integer[Any]]:
    """The smallest type that Megatron uses for a vocabulary of this size."""
    return np.dtype(np.uint16) if vocab_size < _MAX_UINT16_VOCAB else np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids of several documents, one after another, without end-of-text tokens."""

    ids: TokenIds
    """`[n]`, of the shards' type."""
    lengths: NDArray[np.int32]
    """`[d]`, tokens of each document; 0 for an empty one."""

    @classmethod
    def of(cls, documents: Sequence[TokenIds]) -> Self:
        """From the ids of each document, `[length]` each; at least one document."""
        return cls.of_counts(np.concatenate(documents), np.array([len(ids) for ids in documents]))

    @classmethod
    def of_counts(cls, ids: TokenIds, counts: NDArray[np.integer[Any]]) -> Self:
        """From lengths of any integer type.

        Raises:
            UserError: a document has more tokens than the index can count.
        """
        if len(counts) and counts.max() > _MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"a document has {counts.max()} tokens, and a shard's index counts at most {_MAX_DOCUMENT_TOKENS}; "
                f"lower data.max_document_bytes"
            )
        return cls(ids, counts.astype(np.int32))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def documents(self) -> list[TokenIds]:
        """Ids of each document, as views: `[length]` each."""
        return np.split(self.ids, np.cumsum(self.lengths, dtype=np.int64)[:-1]) if len(self) else []

    def ended_by(self, end_of_text_id: int) -> "TokenBatch":
        """The same documents, each followed by one end-of-text token: ids `[n + d]`."""
        if len(self) and self.lengths.max() > _MAX_DOCUMENT_TOKENS:
            raise UserError(f"a document has more than {_MAX_DOCUMENT_TOKENS} tokens; lower data.max_document_bytes")
        lengths = self.lengths + np.int32(1)
        ends = np.cumsum(lengths, dtype=np.int64) - 1
        is_text = np.ones(len(self.ids) + len(self), dtype=bool)
        is_text[ends] = False
        ids = np.empty(len(is_text), dtype=self.ids.dtype)
        ids[is_text] = self.ids
        ids[ends] = end_of_text_id
        return TokenBatch(ids, lengths)


class ShardWriter:
    """Streams documents into `<prefix>.bin`; nothing lies under that name, nor the index's, until `commit`."""

    def __init__(self, prefix: Path, vocab_size: int, end_of_text_id: int) -> None:
        self.bin_path = prefix.with_name(f"{prefix.name}.bin")
        self.idx_path = prefix.with_name(f"{prefix.name}.idx")
        self.num_documents = 0
        self.num_tokens = 0
        self._dtype = token_dtype(vocab_size)
        self._end_of_text_id = end_of_text_id
        self._lengths_path = prefix.with_name(f"{prefix.name}.lengths")
        self._bin = open(temporary_path(self.bin_path), "wb")  # noqa: SIM115  (closed by finish or discard)
        self._lengths = open(temporary_path(self._lengths_path), "wb")  # noqa: SIM115

    def add(self, batch: TokenBatch) -> None:
        """Append documents, each followed by one end-of-text token."""
        if batch.ids.dtype != self._dtype:
            raise TypeError(f"the shard holds {self._dtype} and the batch has {batch.ids.dtype}")
        ended = batch.ended_by(self._end_of_text_id)
        self._bin.write(ended.ids.data)
        self._lengths.write(ended.lengths.data)
        self.num_documents += len(ended)
        self.num_tokens += len(ended.ids)

    def finish(self) -> None:
        """Make both files whole and synced, still under their temporary names."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        self._lengths.close()
        lengths = read_lengths([temporary_path(self._lengths_path)])
        write_index(temporary_path(self.idx_path), self._dtype, lengths, self.num_documents)
        discard(self._lengths_path)

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
        self._lengths.close()
        for path in (self.bin_path, self.idx_path, self._lengths_path):
            discard(path)


def write_index(
    path: Path, dtype: np.dtype[np.integer[Any]], lengths: Iterable[NDArray[np.int32]], num_documents: int
) -> int:
    """Write and sync a .idx in memory that does not grow with the number of documents; returns the number of tokens.

    Args:
        dtype: of the tokens in the .bin.
        lengths: blocks `[any]`, together `[num_documents]`: tokens of each document, its end-of-text token included.
    """
    header = _MAGIC + _HEADER.pack(_VERSION, _TYPE_CODES[dtype], num_documents, num_documents + 1)
    done = tokens = 0
    with open(path, "wb") as at_lengths, open(path, "r+b") as at_offsets, open(path, "r+b") as at_boundaries:
        at_lengths.write(header)
        at_offsets.seek(len(header) + 4 * num_documents)
        at_boundaries.seek(len(header) + 12 * num_documents)
        for block in _at_most(lengths, _BLOCK_DOCUMENTS):
            ends = tokens + np.cumsum(block, dtype=np.int64)
            at_lengths.write(block.astype("<i4", copy=False).data)
            at_offsets.write(((ends - block) * dtype.itemsize).astype("<i8", copy=False).data)
            at_boundaries.write(np.arange(done, done + len(block), dtype="<i8").data)
            done += len(block)
            tokens = int(ends[-1])
        assert done == num_documents, f"{done} lengths of {num_documents} documents"
        at_boundaries.write(struct.pack("<q", done))
        for handle in (at_lengths, at_offsets, at_boundaries):
            handle.flush()
        os.fsync(at_boundaries.fileno())
    return tokens


def read_index(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens of each document `[d]`, its end-of-text token included, and its offset `[d]` in the .bin (bytes): maps."""
    first = len(_MAGIC) + _HEADER.size
    with open(path, "rb") as handle:
        _, _, num_documents, _ = _HEADER.unpack(handle.read(first)[len(_MAGIC) :])
    if not num_documents:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    lengths = np.memmap(path, "<i4", "r", offset=first, shape=(num_documents,))
    return lengths, np.memmap(path, "<i8", "r", offset=first + 4 * num_documents, shape=(num_documents,))


def read_lengths(paths: Iterable[Path]) -> Iterator[NDArray[np.int32]]:
    """Document lengths from files of little-endian int32, one file after another, in blocks."""
    for path in paths:
        with open(path, "rb") as handle:
            while data := handle.read(4 * _BLOCK_DOCUMENTS):
                yield np.frombuffer(data, dtype="<i4")


def append_ranges(out: int, source: Path, ranges: NDArray[np.int64] | Sequence[tuple[int, int]]) -> int:
    """Append byte ranges of a file to an open one, in the kernel where it can; returns the number of bytes.

    Args:
        out: descriptor to write to, at its position; not opened for appending, and nothing buffered above it.
        ranges: `[r, 2]`, first byte and the byte after the last; neighbours are copied as one.

    Raises:
        EOFError: the source ends before a range does.
    """
    total = 0
    descriptor = os.open(source, os.O_RDONLY)
    try:
        for start, stop in _coalesced(np.asarray(ranges, dtype=np.int64).reshape(-1, 2)).tolist():
            position = start
            while position < stop:
                copied = _copy(descriptor, out, position, stop - position)
                if not copied:
                    raise EOFError(f"{source} ends at byte {position}, inside a range up to {stop}")
                position += copied
            total += stop - start
    finally:
        os.close(descriptor)
    return total


def _copy(source: int, out: int, position: int, num_bytes: int) -> int:
    """Copy at most so many bytes; 0 at the end of the source."""
    try:
        return os.copy_file_range(source, out, num_bytes, offset_src=position)
    except OSError as error:
        if error.errno not in _CANNOT_COPY_IN_KERNEL:
            raise
    return os.write(out, os.pread(source, min(num_bytes, _COPY_BYTES), position))


def _coalesced(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[r, 2]` without empty ranges, and with one in place of those that follow each other without a gap."""
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    begins = np.ones(len(ranges), dtype=bool)
    begins[1:] = ranges[1:, 0] != ranges[:-1, 1]
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(ranges)) - 1 if len(ranges) else first
    return np.stack([ranges[first, 0], ranges[last, 1]], axis=1)


def _at_most(blocks: Iterable[NDArray[np.int32]], size: int) -> Iterator[NDArray[np.int32]]:
    """The same numbers in blocks of at most `size`, none of them empty."""
    for block in blocks:
        yield from (block[i : i + size] for i in range(0, len(block), size))
