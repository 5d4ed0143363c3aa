"""Parts of tokens -> the shards of a data set: one .bin and one .idx to train on, and one of each held out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline import parts, token_parts
from data_pipeline.dedup import Verdict
from data_pipeline.manifest import Portion, PortionRecord
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
        dtype, num_tokens = np.dtype(self.dtype), 0
        with open(self.folder / f"{self.portion}.bin", "wb", buffering=0) as out:
            for part in self.token_parts:
                source = token_parts.bin_path(part.folder, self.portion)
                append_ranges(out.fileno(), source, self._ranges(part, dtype.itemsize))
                num_tokens += part.portions[self.portion].tokens
                report(Advance(tokens=num_tokens))
            os.fsync(out.fileno())
        total = _total([part.portions[self.portion] for part in self.token_parts])
        written = write_index(self.folder / f"{self.portion}.idx", dtype, self._lengths(), total.documents)
        assert written == total.tokens, f"{written} tokens joined of {total.tokens}"
        return total

    def _ranges(self, part: TokenPart, itemsize: int) -> NDArray[np.int64]:
        """Byte ranges [r, 2] of the part's .bin that go in."""
        lengths = token_parts.read_lengths(part.folder, self.portion)
        ends = np.cumsum(lengths, dtype=np.int64) * itemsize
        if part.kept is None:
            return np.array([[0, ends[-1] if len(ends) else 0]], np.int64)
        kept = part.kept[self.portion]
        return np.stack([(ends - lengths * itemsize)[kept], ends[kept]], axis=1)

    def _lengths(self) -> Iterator[NDArray[np.int32]]:
        for part in self.token_parts:
            lengths = token_parts.read_lengths(part.folder, self.portion)
            yield lengths if part.kept is None else lengths[part.kept[self.portion]]


def _total(records: Sequence[PortionRecord]) -> PortionRecord:
    return PortionRecord(
        documents=sum(record.documents for record in records),
        tokens=sum(record.tokens for record in records),
        text_bytes=sum(record.text_bytes for record in records),
    )


def without_copies(part: Path, verdicts: NDArray[np.uint8], heldout_fraction: float) -> TokenPart:
    """Of a part that the first pass has tokenized: the documents that are no copies."""
    rows = parts.read_documents(part)
    is_heldout, is_kept = parts.is_heldout(rows, heldout_fraction), verdicts == Verdict.KEEP
    kept: dict[Portion, NDArray[np.bool_]] = {"train": is_kept[~is_heldout], "heldout": is_kept[is_heldout]}
    text_bytes: dict[Portion, int] = {
        "train": int(rows["text_bytes"][~is_heldout & is_kept].sum()),
        "heldout": int(rows["text_bytes"][is_heldout & is_kept].sum()),
    }
    portions = {
        portion: PortionRecord(
            documents=int(np.count_nonzero(chosen)),
            tokens=int(token_parts.read_lengths(part, portion)[chosen].sum(dtype=np.int64)),
            text_bytes=text_bytes[portion],
        )
        for portion, chosen in kept.items()
    }
    return TokenPart(part, portions, None if is_kept.all() else kept)
