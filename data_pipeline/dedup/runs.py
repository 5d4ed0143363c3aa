"""Sorted runs of records on disk, one a part, merged by ranges of keys that fit into memory.

Keys are hashes, so they spread evenly; whatever range holds too many records is halved until it holds few enough, and
a single key with too many is read in pieces, in order. A record's `document` counts within its part on disk, and over
the whole corpus once it is read here.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT = np.dtype([("key", "<u8"), ("rest", "<u8"), ("document", "<u4")])
"""A document: both halves of its text's digest."""
BAND = np.dtype([("key", "<u8"), ("rest", "<u4"), ("document", "<u4")])
"""A document in one band: the band's hash, and the signature entry that follows."""
PARAGRAPH = np.dtype([("key", "<u8"), ("rest", "<u8"), ("document", "<u4"), ("paragraph", "<u4")])
"""A paragraph: both halves of its digest."""

Records = NDArray[Any]
"""Records of one of these types."""

_REST_BITS = 64


def sorted_records(records: Records) -> Records:
    """By key, then rest; the order of equal ones stays."""
    return records[np.lexsort((records["rest"], records["key"]))]


@dataclass(frozen=True)
class Run:
    """Sorted records inside a .npy file: all of a one-dimensional array, or one row of a two-dimensional one."""

    path: Path
    first_byte: int
    num_records: int
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, path: Path, row: int = 0) -> "Run":
        with open(path, "rb") as handle:
            np.lib.format.read_magic(handle)
            shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
            return cls(path, handle.tell() + row * shape[-1] * dtype.itemsize, shape[-1], dtype)

    def read(self, first: int, last: int) -> Records:
        offset = self.first_byte + first * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, last - first, offset=offset)

    def values(self, *places: int) -> list[int]:
        """Key and rest of the records at these places, as one number each."""
        with open(self.path, "rb", buffering=0) as handle:
            return [self._value(handle.fileno(), at) for at in places]

    def find(self, value: int, first: int, last: int) -> int:
        """Place of the first record of [first, last) whose key and rest, as one number, are not below the value."""
        with open(self.path, "rb", buffering=0) as handle:
            return bisect_left(range(last), value, first, key=lambda at: self._value(handle.fileno(), at))

    def _value(self, descriptor: int, at: int) -> int:
        data = os.pread(descriptor, self.dtype.itemsize, self.first_byte + at * self.dtype.itemsize)
        record = np.frombuffer(data, self.dtype)[0]
        return (int(record["key"]) << _REST_BITS) | int(record["rest"])


@dataclass(frozen=True)
class MergedRuns:
    """The runs of all parts as one, sorted by key, rest and document."""

    runs: Sequence[Run]
    first_documents: Sequence[int]
    """Of each part: the number of its first document in the whole corpus."""

    @property
    def num_records(self) -> int:
        return sum(run.num_records for run in self.runs)

    def chunks(self, max_records: int) -> Iterator[Records]:
        """All records in order, some at a time; records of equal key and rest are split only where they are more."""
        last = [run.num_records for run in self.runs]
        return self._between([0] * len(last), last, max_records)

    def _between(self, first: list[int], last: list[int], max_records: int) -> Iterator[Records]:
        """Records first[part] to last[part] of each part, which are all those of some range of values."""
        spans = list(zip(self.runs, first, last, strict=True))
        num = sum(last) - sum(first)
        if num <= max_records:
            yield from [self._read_all(first, last)] if num else []
            return
        values = [value for run, begin, end in spans if begin < end for value in run.values(begin, end - 1)]
        if min(values) == max(values):
            yield from self._of_one_value(first, last, max_records)
            return
        middle = (min(values) + max(values) + 1) // 2
        cut = [run.find(middle, begin, end) if begin < end else begin for run, begin, end in spans]
        yield from self._between(first, cut, max_records)
        yield from self._between(cut, last, max_records)

    def _read_all(self, first: list[int], last: list[int]) -> Records:
        spans = enumerate(zip(first, last, strict=True))
        return sorted_records(np.concatenate([self._read(part, span) for part, span in spans]))

    def _of_one_value(self, first: list[int], last: list[int], max_records: int) -> Iterator[Records]:
        for part, (begin, end) in enumerate(zip(first, last, strict=True)):
            for at in range(begin, end, max_records):
                yield self._read(part, (at, min(at + max_records, end)))

    def _read(self, part: int, span: tuple[int, int]) -> Records:
        records = self.runs[part].read(*span)
        records["document"] += np.uint32(self.first_documents[part])
        return records
