"""What is decided over the whole corpus, and what that means for the documents of one part.

Decided from what the first pass left beside the text: which documents are copies of earlier ones, which paragraphs
earlier documents have, and which phrases of the evaluation texts are too common to count as leaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_pipeline import dedup, parts, token_parts
from data_pipeline.decontamination import EvaluationNgrams, common_ngrams, cut, spans_by_document
from data_pipeline.dedup import Verdict
from data_pipeline.manifest import Portion
from data_pipeline.parts import StoredIds
from data_pipeline.progress import Progress
from data_pipeline.tally import KEPT_CHARS, KEPT_TEXTS, Tally
from data_pipeline.tokenization import Tokenizer
from data_pipeline.words import UInt64s
from trainer.data_config import DataConfig, DecontaminateConfig

OVERLAPS_FILE = "overlaps.npy"
"""In a part: its overlaps with evaluation texts (`decontamination.OVERLAP`), by document."""
_COMMON_FILE = "common_ngrams.npy"

DROP_REASON_OF = {Verdict.DUPLICATE: "duplicate", Verdict.NEAR_DUPLICATE: "near_duplicate"}


def decide(part_folders: Sequence[Path], data: DataConfig, folder: Path, progress: Progress) -> None:
    """Write the decisions over all parts, in their order, into `folder`."""

    def update(stage: str, done: int, total: int) -> None:
        progress.update(f"compare documents: {stage}", done, total, "records")

    dedup.decide(part_folders, data.dedup, folder, progress=update)
    if data.decontaminate.against is not None:
        overlaps = (np.load(part / OVERLAPS_FILE) for part in part_folders)
        verdicts = (dedup.read_verdicts(folder, number) for number in range(len(part_folders)))
        np.save(folder / _COMMON_FILE, common_ngrams(overlaps, verdicts, data.decontaminate.max_documents))


@dataclass(frozen=True)
class PartDecisions:
    """What becomes of the documents of one part."""

    ids: StoredIds
    """Where each was found."""
    verdicts: NDArray[np.uint8]
    """[d]"""
    removed_paragraphs: dict[int, list[int]] = field(default_factory=dict)
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Overlaps with evaluation texts: document -> characters [first, end)."""
    decontaminate: DecontaminateConfig | None = None
    """How to cut around them; given with them."""
    rare_ngrams: EvaluationNgrams | None = None
    """To find them again where paragraphs were taken out before them."""

    @classmethod
    def read(cls, decisions: Path, number: int, part: Path, data: DataConfig, evaluation: Path | None) -> Self:
        """Of the part with this number in the order of `decide`."""
        verdicts = dedup.read_verdicts(decisions, number)
        removed = dedup.read_removed_paragraphs(decisions, number) if data.dedup.paragraphs else {}
        if evaluation is None:
            return cls(StoredIds(part), verdicts, removed)
        common: UInt64s = np.load(decisions / _COMMON_FILE)
        spans = spans_by_document(np.load(part / OVERLAPS_FILE), common)
        both = removed.keys() & spans.keys()
        rare = EvaluationNgrams.load(evaluation).without(common) if both else None
        return cls(StoredIds(part), verdicts, removed, spans, data.decontaminate, rare)

    def apply(self, number: int, text: str, tally: Tally) -> list[str]:
        """What is trained on of a document: nothing, its text, or what is left of it."""
        place = self.ids[number]
        if self.verdicts[number] != Verdict.KEEP:
            tally.drop(DROP_REASON_OF[Verdict(self.verdicts[number])], place, text)
            return []
        spans = self.spans.get(number, [])
        if removed := self.removed_paragraphs.get(number):
            whole, text = text, dedup.remove_paragraphs(text, removed)
            if not text.strip():
                tally.drop("repeated_paragraphs", place, whole)
                return []
            tally.repair("repeated_paragraph", place, len(removed))
            if spans and self.rare_ngrams:  # their places have moved
                spans = spans_by_document(self.rare_ngrams.overlaps([text]), np.zeros(0, np.uint64)).get(0, [])
        if not spans or self.decontaminate is None:
            return [text]
        pieces, num_cuts = cut(text, spans, self.decontaminate)
        if not pieces:
            tally.drop("contaminated", place, text)
        else:
            tally.repair("contaminated_span", place, num_cuts)
        return pieces


def tally_copies(decided: PartDecisions, part: Path, heldout_fraction: float, tokenizer: Tokenizer) -> Tally:
    """The copies in a part of tokens, counted; the first of them with their text."""
    tally = Tally()
    texts = _TokenizedTexts(part, heldout_fraction, tokenizer)
    for number in np.flatnonzero(decided.verdicts != Verdict.KEEP).tolist():
        reason = DROP_REASON_OF[Verdict(decided.verdicts[number])]
        wants_text = len(tally.samples.get(reason, ())) < KEPT_TEXTS
        tally.drop(reason, decided.ids[number], texts.read(number) if wants_text else "")
    return tally


class _TokenizedTexts:
    """Texts of a part's documents, by their number, from the tokens they have become."""

    def __init__(self, part: Path, heldout_fraction: float, tokenizer: Tokenizer) -> None:
        self._part, self._tokenizer = part, tokenizer
        self._heldout = parts.is_heldout(parts.read_documents(part), heldout_fraction)

    def read(self, number: int) -> str:
        is_heldout = bool(self._heldout[number])
        index = int(np.count_nonzero(self._heldout[:number] == is_heldout))
        portion: Portion = "heldout" if is_heldout else "train"
        ends = np.cumsum(token_parts.read_lengths(self._part, portion), dtype=np.int64)
        start = int(ends[index - 1]) if index else 0
        tokens = np.memmap(token_parts.bin_path(self._part, portion), self._tokenizer.dtype, mode="r")
        return self._tokenizer.decode(tokens[start : min(int(ends[index]) - 1, start + KEPT_CHARS)])


class OverlapWriter:
    """Finds the overlaps of a part's documents, batch by batch."""

    def __init__(self, folder: Path, evaluation: Path) -> None:
        self._folder, self._ngrams = folder, EvaluationNgrams.load(evaluation)
        self._found: list[NDArray[Any]] = [self._ngrams.overlaps([])]
        self._num_documents = 0

    def add(self, texts: list[str]) -> None:
        found = self._ngrams.overlaps(texts)
        found["document"] += np.uint32(self._num_documents)
        self._found.append(found)
        self._num_documents += len(texts)

    def finish(self) -> None:
        np.save(self._folder / OVERLAPS_FILE, np.concatenate(self._found))
