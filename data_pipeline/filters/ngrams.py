"""n-grams that a document repeats, for all documents of a batch at once.

Shapes: `w` words of the batch, `d` documents, `o` occurrences of repeated n-grams, `g` distinct repeated n-grams.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.words import Int64s, UInt64s

_BASE = np.uint64(0x5851F42D4C957F2D)
_DOCUMENT = np.uint64(0x9E3779B97F4A7C15)  # keeps the same n-gram of two documents apart


@dataclass(frozen=True)
class RepeatedNgrams:
    n: int
    first_words: Int64s
    """[o] Index of the first word of each occurrence; those of one n-gram of one document stand together."""
    group_starts: Int64s
    """[g] Index into `first_words` where each n-gram's occurrences begin; it has two at least."""

    @property
    def counts(self) -> Int64s:
        """[g]"""
        return np.diff(self.group_starts, append=len(self.first_words))

    def words_of_later_ones(self, num_words: int) -> NDArray[np.bool_]:
        """[w] Whether a word belongs to an occurrence that is not its n-gram's first."""
        is_later = np.zeros(num_words + 1, bool)
        is_later[self.first_words] = True
        if len(self.group_starts):
            is_later[np.minimum.reduceat(self.first_words, self.group_starts)] = False
        begins = np.flatnonzero(is_later)
        steps = np.zeros(num_words + 1, np.int64)
        steps[begins] += 1
        steps[begins + self.n] -= 1
        return np.cumsum(steps)[:-1] > 0


def repeated_ngrams(hashes: UInt64s, document: Int64s, longest: int) -> Iterator[RepeatedNgrams]:
    """n-grams of two words and more that occur twice in their document, n by n.

    An n-gram repeats only if the two (n-1)-grams in it do, so few are left to sort after the first n.

    Args:
        hashes: [w]
        document: [w] index of each word's document, ascending.
    """
    first = np.arange(len(hashes))
    rolled = hashes + document.astype(np.uint64) * _DOCUMENT
    for n in range(2, longest + 1):
        last = first + n - 1
        inside = np.flatnonzero(last < len(hashes))
        inside = inside[document[first[inside]] == document[last[inside]]]
        first = first[inside]
        rolled = rolled[inside] * _BASE + hashes[first + n - 1]
        repeated = _groups(n, first, rolled)
        yield repeated
        repeats = np.zeros(len(hashes) + 1, bool)
        repeats[repeated.first_words] = True
        candidates = repeats[first] & repeats[first + 1]
        first, rolled = first[candidates], rolled[candidates]


def _groups(n: int, first: Int64s, rolled: UInt64s) -> RepeatedNgrams:
    order = np.argsort(rolled)
    ordered = rolled[order]
    same_as_next = np.zeros(len(order) + 1, bool)
    same_as_next[1:-1] = ordered[1:] == ordered[:-1]
    is_repeated = same_as_next[1:] | same_as_next[:-1]
    is_group_start = ~same_as_next[:-1][is_repeated]
    return RepeatedNgrams(n, first[order[is_repeated]], np.flatnonzero(is_group_start))


def most_frequent_ngrams(repeated: RepeatedNgrams, document: Int64s, word_chars: Int64s, num_documents: int) -> Int64s:
    """[d] Characters of each document's most frequent n-gram times its occurrences; of several, the longest one's."""
    sums = np.concatenate([[0], np.cumsum(word_chars)])
    first = repeated.first_words[repeated.group_starts]
    chars = sums[first + repeated.n] - sums[first]
    best = np.zeros(num_documents, np.int64)
    np.maximum.at(best, document[first], (repeated.counts << 32) | chars)  # fewer than 2^31 of either
    return (best >> 32) * (best & 0xFFFFFFFF)
