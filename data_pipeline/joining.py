"""Parts of tokens -> the shards of a data set: one .bin and one .idx to train on, and one of each held out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import token_parts
from data_pipeline.manifest import PORTIONS, Portion, PortionRecord
from data_pipeline.shards import append_ranges, write_index
from data_pipeline.tasks import Advance, Report


@dataclass(frozen=True)
class TokenPart:
    """A part of tokens, and what of it goes into the shards."""

    folder: Path
    portions: Mapping[Portion, PortionRecord]
    """What goes in."""
    kept: Mapping[Portion, NDArray[np.bool_]] | None = None
    """[documents of the portion] Which documents do; None where all do."""


@dataclass(frozen=True)
class JoinTask:
    """Writes PORTION.bin and PORTION.idx of one portion of a data set into `folder`."""

    dataset: str
    portion: Portion
    token_parts: tuple[TokenPart, ...]
    dtype: str
    """Of the token ids."""
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.portion}"

    def run(self, report: Report) -> PortionRecord:
        itemsize, num_tokens = np.dtype(self.dtype).itemsize, 0
        with open(self.folder / f"{self.portion}.bin", "wb") as out:
            for part in self.token_parts:
                append_ranges(out.fileno(), token_parts.bin_path(part.folder, self.portion), self._ranges(part, itemsize))
                num_tokens += part.portions[self.portion].tokens
                report(Advance(tokens=num_tokens))
            os.fsync(out.fileno())
        total = _total([part.portions[self.portion] for part in self.token_parts])
        with open(self.folder / f"{self.portion}.idx", "wb") as out:
            write_index(out, self._lengths, total.documents, np.dtype(self.dtype))
            out.flush()
            os.fsync(out.fileno())
        return total

    def _ranges(self, part: TokenPart, itemsize: int) -> NDArray[np.int64]:
        """Byte ranges [r, 2] of the part's .bin that go in."""
        lengths = np.load(token_parts.lengths_path(part.folder, self.portion), mmap_mode="r")
        ends = np.cumsum(lengths, dtype=np.int64) * itemsize
        if part.kept is None:
            return np.array([[0, ends[-1]]], np.int64) if len(ends) else np.zeros((0, 2), np.int64)
        starts = ends - lengths * itemsize
        kept = part.kept[self.portion]
        return np.stack([starts[kept], ends[kept]], axis=1)

    def _lengths(self) -> Iterator[NDArray[np.int32]]:
        for part in self.token_parts:
            lengths = np.load(token_parts.lengths_path(part.folder, self.portion), mmap_mode="r")
            yield np.asarray(lengths if part.kept is None else lengths[part.kept[self.portion]])


def _total(records: Sequence[PortionRecord]) -> PortionRecord:
    return PortionRecord(
        documents=sum(record.documents for record in records),
        tokens=sum(record.tokens for record in records),
        text_bytes=sum(record.text_bytes for record in records),
    )
