"""The bytes of a split as readers want them: whole lines of a byte range, or what a compressed file holds."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol

from data_pipeline.sources.decompress import DecompressedStream
from data_pipeline.sources.split import Compression, Split
from data_pipeline.sources.storage import is_url, open_file, read_block
from data_pipeline.tally import Tally

BLOCK_BYTES = 1 << 20

OnBytes = Callable[[int], None]
"""Hears of bytes of input that have been used."""


class Stream(Protocol):
    offset: int
    """Where, in the uncompressed file, the next block begins."""
    is_damaged: bool
    """Whether there was a gap, which has been counted."""

    def read(self) -> bytes:
        """The next block; empty at the end or at a gap.

        Raises:
            OSError: reading fails.
        """
        ...

    def resume(self) -> bool:
        """Whether the stream goes on behind a gap."""
        ...


class LineRange:
    """The lines of a plain file whose first byte lies in [start, end), as blocks; the last may end far behind."""

    is_damaged = False

    def __init__(self, handle: BinaryIO, start: int, end: int | None, on_bytes: OnBytes) -> None:
        self._handle, self._end, self._on_bytes = handle, end, on_bytes
        self._pending = b""  # read already, to be given first
        self._ends_line = True
        self.offset = start
        if start:
            self._skip_started_line(start)

    def read(self) -> bytes:
        block = self._pending or self._next_block()
        self._pending = b""
        self.offset += len(block)
        return block

    def resume(self) -> bool:
        return False

    def _skip_started_line(self, start: int) -> None:
        self._handle.seek(start - 1)
        position = start - 1
        while block := self._fetch(BLOCK_BYTES):
            found = block.find(b"\n")
            position += len(block) if found < 0 else found + 1
            if found >= 0:
                self._pending = self._up_to_end(block[found + 1 :], position)
                break
            if self._is_past_end(position):
                break
        self.offset = position
        if self._is_past_end(position):
            self._ends_line, self._pending = True, b""

    def _next_block(self) -> bytes:
        if not self._is_past_end(self.offset):
            return self._up_to_end(self._fetch(BLOCK_BYTES), self.offset)
        if self._ends_line:
            return b""
        block = self._fetch(BLOCK_BYTES)
        return self._up_to_newline(block, 0)

    def _up_to_end(self, block: bytes, position: int) -> bytes:
        """The part of a block that begins at `position` which belongs to lines of the range."""
        if self._end is None or position + len(block) < self._end:
            return block
        return self._up_to_newline(block, max(0, self._end - position - 1))

    def _up_to_newline(self, block: bytes, first: int) -> bytes:
        found = block.find(b"\n", first)
        self._ends_line = found >= 0 or not block
        return block[: found + 1] if found >= 0 else block

    def _is_past_end(self, position: int) -> bool:
        return self._end is not None and position >= self._end

    def _fetch(self, num_bytes: int) -> bytes:
        block = read_block(self._handle, num_bytes)
        self._on_bytes(len(block))
        return block


@contextmanager
def open_stream(split: Split, tally: Tally, on_bytes: OnBytes) -> Iterator[Stream]:
    """The bytes of a split that is a file or a range of one.

    Raises:
        OSError: the file cannot be opened, or is not the one that was planned.
    """
    with open_file(split.path, seekable=split.seekable) as handle:
        check_unchanged(split, handle)
        whole = split.end == split.file_bytes  # a web server may not know how large its file is
        end = None if whole else split.end
        yield make_stream(handle, split.compression, split.place, tally, on_bytes, split.start, end)


def make_stream(
    handle: BinaryIO,
    compression: Compression,
    place: str,
    tally: Tally,
    on_bytes: OnBytes,
    start: int = 0,
    end: int | None = None,
) -> Stream:
    if not compression:
        return LineRange(handle, start, end, on_bytes)

    def read_input(num_bytes: int) -> bytes:
        data = read_block(handle, num_bytes)
        on_bytes(len(data))
        return data

    return DecompressedStream(compression, read_input, place, tally)


def check_unchanged(split: Split, handle: BinaryIO) -> None:
    """Refuse a local file of another size than the plan saw: its ranges would lose or tear lines."""
    if is_url(split.path) or split.file_bytes is None:
        return
    size_bytes = os.fstat(handle.fileno()).st_size
    if size_bytes != split.file_bytes:
        raise OSError(f"it has {size_bytes:,} bytes and had {split.file_bytes:,} when it was planned; run again")
