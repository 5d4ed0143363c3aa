"""N-grams that documents share with evaluation texts.

Shapes: `g` n-grams of the evaluation texts, `o` overlaps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.dedup import Verdict
from data_pipeline.words import Int64s, UInt64s, WordTable

OVERLAP = np.dtype([("document", "<u4"), ("first_char", "<u4"), ("end_char", "<u4"), ("ngram", "<u8")])
"""One n-gram of a document that an evaluation text has: the document's index, characters [first, end), the hash."""

_NUM_COUNTS = 3  # entries ahead of the hashes in a file
_FILTER_BITS_PER_NGRAM = 16  # 8 to 16: about one in 10 of other n-grams gets past the filter


@dataclass(frozen=True)
class EvaluationNgrams:
    """Every n words in a row of the evaluation texts."""

    hashes: UInt64s
    """[g] Sorted and distinct."""
    ngram: int
    """Words of each."""
    num_strings: int
    """Evaluation strings read."""
    num_short: int
    """Of them, those with fewer words, which can never be found."""

    @classmethod
    def load(cls, path: Path) -> Self:
        stored = np.load(path)
        ngram, num_strings, num_short = stored[:_NUM_COUNTS].tolist()
        return cls(stored[_NUM_COUNTS:], ngram, num_strings, num_short)

    def save(self, path: Path) -> None:
        """One .npy file [3 + g]: the three numbers, then the hashes. Not synced."""
        counts = np.array([self.ngram, self.num_strings, self.num_short], np.uint64)
        np.save(path, np.concatenate([counts, self.hashes]))

    @property
    def fingerprint(self) -> str:
        """The same for the same n-grams, whatever files they come from."""
        return xxhash.xxh3_128_hexdigest(self.ngram.to_bytes(8, "little") + self.hashes.tobytes())

    def without(self, common: UInt64s) -> "EvaluationNgrams":
        return replace(self, hashes=np.setdiff1d(self.hashes, common, assume_unique=True))

    def overlaps(self, texts: Sequence[str], table: WordTable | None = None) -> NDArray[Any]:
        """OVERLAP records [o] of a batch, by document and place; `table` is the words of the texts, where known."""
        table = table or WordTable.of(texts)
        hashes, first_words = table.ngrams(self.ngram)
        found = self._find(hashes)
        first_words = first_words[found]
        documents = np.searchsorted(table.first_words, first_words, side="right") - 1
        records = np.zeros(len(found), OVERLAP)
        records["document"], records["ngram"] = documents, hashes[found]
        records["first_char"] = table.starts[first_words] - table.first_bytes[documents]
        records["end_char"] = table.ends[first_words + self.ngram - 1] - table.first_bytes[documents]
        for document in np.unique(documents).tolist():
            if not texts[document].isascii():
                _bytes_to_characters(records, document, texts[document])
        return records

    def _find(self, hashes: UInt64s) -> Int64s:
        """Indices of those hashes that are among the evaluation's."""
        if not len(self.hashes):
            return np.zeros(0, np.int64)
        bits, shift = self._filter
        top = hashes >> shift
        passed = np.flatnonzero((bits[top >> np.uint64(3)] >> (top & np.uint64(7)).astype(np.uint8)) & 1)
        candidates = hashes[passed]
        at = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        return passed[self.hashes[at] == candidates]

    @cached_property
    def _filter(self) -> tuple[NDArray[np.uint8], np.uint64]:
        """Which top bits of a hash occur at all, eight to a byte, and how far to shift for them.

        It stays in the processor's cache, where a binary search of all hashes would not.
        """
        num_bits = max(3, (len(self.hashes) * _FILTER_BITS_PER_NGRAM).bit_length() - 1)
        shift = np.uint64(64 - num_bits)
        occurs = np.zeros(1 << num_bits, bool)
        occurs[self.hashes >> shift] = True
        return np.packbits(occurs, bitorder="little"), shift


def _bytes_to_characters(records: NDArray[Any], document: int, text: str) -> None:
    """Turn byte offsets of this document into character offsets, in place; records are sorted by document."""
    begin, end = np.searchsorted(records["document"], [document, document + 1])
    is_first_byte = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
    num_before = np.concatenate([[0], np.cumsum(is_first_byte)])
    for name in ("first_char", "end_char"):
        records[name][begin:end] = num_before[records[name][begin:end]]


def common_ngrams(
    overlaps: Iterable[NDArray[Any]], verdicts: Iterable[NDArray[np.uint8]], max_documents: int
) -> UInt64s:
    """Sorted n-grams met in more than `max_documents` documents that are kept, over all parts.

    Both come a part at a time; memory holds one part and one count for each n-gram met.
    """
    ngrams, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for records, mine in zip(overlaps, verdicts, strict=True):
        kept = records[mine[records["document"]] == Verdict.KEEP]
        met = _once_a_document(kept)
        ngrams, slots = np.unique(np.concatenate([ngrams, met]), return_inverse=True)
        weights = np.concatenate([counts, np.ones(len(met), np.int64)])
        counts = np.zeros(len(ngrams), np.int64)
        np.add.at(counts, slots, weights)
    return ngrams[counts > max_documents]


def _once_a_document(overlaps: NDArray[Any]) -> UInt64s:
    """The n-grams of each document, however often it has them."""
    in_order = overlaps[np.lexsort((overlaps["document"], overlaps["ngram"]))]
    is_first = np.ones(len(in_order), bool)
    is_first[1:] = in_order["ngram"][1:] != in_order["ngram"][:-1]
    is_first[1:] |= in_order["document"][1:] != in_order["document"][:-1]
    return in_order["ngram"][is_first]


def spans_by_document(overlaps: NDArray[Any], common: UInt64s) -> dict[int, list[tuple[int, int]]]:
    """Of documents with overlaps that are no common phrases: document -> characters [first, end) of each, in order."""
    spans: dict[int, list[tuple[int, int]]] = {}
    rare = overlaps[~np.isin(overlaps["ngram"], common)]
    for document, first, end, _ in rare.tolist():
        spans.setdefault(document, []).append((first, end))
    return spans
