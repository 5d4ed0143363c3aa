"""What rules of quality are about: counts and fractions of every document of a batch, as arrays.

Shapes: `d` documents, `w` words, `b` bytes of the batch's UTF-8 text (as in `WordTable`). Everything is computed when
first asked for.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.filters.ngrams import most_frequent_ngrams, repeated_ngrams
from data_pipeline.words import Int64s, UInt64s, WordTable

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

_BULLETS = "•‣▪◦●○■·-*"  # of plain text and of Markdown; the papers name none
_ELLIPSES = ("...", "…")
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Rule:
    """A named reason to drop a document."""

    reason: str
    """Key of DROP_REASONS."""
    is_broken: Callable[["TextMeasures"], Bools]
    """[d] Whether each document breaks the rule."""


@dataclass(frozen=True)
class LineMeasures:
    """Of one document's lines: what stands between line feeds, stripped, unless that is nothing."""

    repeated_lines: float
    """Fraction of lines that equal an earlier one; and so on."""
    repeated_line_chars: float
    repeated_paragraphs: float
    """Paragraphs are what stands between blank lines."""
    repeated_paragraph_chars: float
    bullets: float
    """Fraction of lines that begin with a bullet."""
    ellipses: float
    """Fraction of lines that end in an ellipsis."""

    @classmethod
    def of(cls, text: str) -> "LineMeasures":
        lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
        paragraphs = [stripped for part in _BLANK_LINES.split(text) if (stripped := part.strip())]
        num_lines = max(len(lines), 1)
        return cls(
            *_repeated_fractions(lines),
            *_repeated_fractions(paragraphs),
            bullets=sum(line[0] in _BULLETS for line in lines) / num_lines,
            ellipses=sum(line.endswith(_ELLIPSES) for line in lines) / num_lines,
        )


def _repeated_fractions(parts: list[str]) -> tuple[float, float]:
    """Of parts that equal an earlier one: their share of the parts, and of the parts' characters."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0.0, 0.0
    num_chars = sum(map(len, parts))
    return 1 - len(distinct) / len(parts), 1 - sum(map(len, distinct)) / num_chars


class TextMeasures:
    """Measures [d] of a batch's texts. Words are `WordTable`'s; a fraction of nothing is 0."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.words = WordTable.of(texts)

    @cached_property
    def num_words(self) -> Int64s:
        return np.diff(self.words.first_words)

    @cached_property
    def mean_word_chars(self) -> Floats:
        """Characters of a word, on average."""
        return self._sums(self._word_chars) / np.maximum(self.num_words, 1)

    @cached_property
    def wide_letters(self) -> Floats:
        """Fraction of the words' characters from U+0800 on: Hangul, kana, Chinese, Thai, the Indic scripts."""
        if self._is_ascii:
            return np.zeros(len(self.texts))
        return self._fractions(self._in_words(self._data >= 0xE0))

    @cached_property
    def ascii_letters(self) -> Floats:
        """Fraction of the words' characters that are ASCII (digits too)."""
        return self._fractions(self._in_words(self._data < 0x80))

    @cached_property
    def hashes_per_word(self) -> Floats:
        return self._counts(lambda text: text.count("#")) / np.maximum(self.num_words, 1)

    @cached_property
    def ellipses_per_word(self) -> Floats:
        return self._counts(lambda text: text.count("...") + text.count("…")) / np.maximum(self.num_words, 1)

    @cached_property
    def alphabetic_tokens(self) -> Floats:
        """Fraction of what stands between ASCII white space that holds a letter (not only digits and symbols)."""
        is_inside = ~_IS_SPACE[self._data]
        is_first = is_inside.copy()
        is_first[1:] &= ~is_inside[:-1]
        token_starts = np.flatnonzero(is_first)
        has_letter = np.zeros(len(token_starts), bool)
        is_number = self._in_words(_IS_DIGIT[self._data]) == self.words.ends - self.words.starts
        starts = self.words.starts[~is_number & ~self._begin_with_symbols]
        has_letter[np.searchsorted(token_starts, starts, side="right") - 1] = True
        first_tokens = np.searchsorted(token_starts, self.words.first_bytes)
        sums = np.concatenate([[0], np.cumsum(has_letter)])
        return np.diff(sums[first_tokens]) / np.maximum(np.diff(first_tokens), 1)

    @property
    def _begin_with_symbols(self) -> Bools:
        """[w] Words that begin with one of U+2080 to U+2BFF (arrows, boxes, ...) or U+1F000 to U+1FFFF (emoji)."""
        first, second = self._data[self.words.starts], self._data[self.words.starts + 1]
        return ((first == 0xE2) & (second >= 0x82) & (second <= 0xAF)) | ((first == 0xF0) & (second == 0x9F))

    def num_distinct(self, word_hashes: UInt64s) -> Int64s:
        """How many of some words each document has."""
        found = np.zeros(len(self.texts), np.int64)
        for word in word_hashes:
            at = np.flatnonzero(self.words.hashes == word)
            found += np.bincount(self._document[at], minlength=len(found)) > 0
        return found

    @cached_property
    def lines(self) -> dict[str, Floats]:
        """Every field of LineMeasures."""
        measures = [LineMeasures.of(text) for text in self.texts]
        return {name: np.array([getattr(m, name) for m in measures]) for name in LineMeasures.__dataclass_fields__}

    @cached_property
    def ngrams(self) -> dict[int, Floats]:
        """By n, a fraction of the words' characters.

        n = 2 to 4: in the most frequent n-gram, times its occurrences (one that occurs once does not count).
        n = 5 to 10: in words of n-grams that occurred earlier in the document, each word counted once.
        """
        document, word_chars = self._document, self._word_chars
        num_chars = np.maximum(self._sums(word_chars), 1)
        fractions = {n: np.zeros(len(self.texts)) for n in range(2, 11)}
        for repeated in repeated_ngrams(self.words.hashes, document, max(fractions)):
            if repeated.n <= 4:
                chars = most_frequent_ngrams(repeated, document, word_chars, len(self.texts))
            else:
                chars = self._sums(np.where(repeated.words_of_later_ones(len(document)), word_chars, 0))
            fractions[repeated.n] = chars / num_chars
        return fractions

    @cached_property
    def _is_ascii(self) -> bool:
        """Of the whole batch: characters are bytes."""
        return all(map(str.isascii, self.texts))

    @cached_property
    def _data(self) -> NDArray[np.uint8]:
        """[b + 1] The bytes that WordTable's offsets count."""
        return np.frombuffer("\n".join([*self.texts, ""]).encode() + b"\n", np.uint8)

    @cached_property
    def _document(self) -> Int64s:
        """[w] Index of each word's document."""
        return np.repeat(np.arange(len(self.texts)), self.num_words)

    @cached_property
    def _word_chars(self) -> Int64s:
        """[w]"""
        if self._is_ascii:
            return self.words.ends - self.words.starts
        return self._in_words((self._data & 0xC0) != 0x80)  # not the second to fourth byte of a character

    def _in_words(self, flags: Bools) -> Int64s:
        """[w] How many of each word's bytes are flagged; flags are [b + 1]."""
        sums = np.zeros(len(flags) + 1, np.int32)  # of half the size is twice as fast; a batch is far below 2 GB
        np.cumsum(flags, dtype=np.int32, out=sums[1:])
        return (sums[self.words.ends] - sums[self.words.starts]).astype(np.int64)

    def _sums(self, of_words: Int64s) -> Int64s:
        sums = np.concatenate([[0], np.cumsum(of_words)])
        return np.diff(sums[self.words.first_words])

    def _fractions(self, of_words: Int64s) -> Floats:
        return self._sums(of_words) / np.maximum(self._sums(self._word_chars), 1)

    def _counts(self, count: Callable[[str], int]) -> Int64s:
        return np.fromiter(map(count, self.texts), np.int64, len(self.texts))


_IS_SPACE = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\v\f", np.uint8))
_IS_DIGIT = np.isin(np.arange(256), np.frombuffer(b"0123456789", np.uint8))
