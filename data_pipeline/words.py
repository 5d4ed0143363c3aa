"""Words of many documents at once, as 64-bit hashes: what deduplication, decontamination and quality rules count in.

A word is a run of letters and digits, lower-cased; punctuation and white space only separate. Scripts that write
without spaces (kana, Chinese characters) have a word per character. Everything is arrays over the bytes of a whole
batch, so that a document costs no Python of its own.

Shapes: `b` bytes of the batch, `w` words, `d` documents.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

UInt64s = NDArray[np.uint64]
Int64s = NDArray[np.int64]

_SEED = 0x9E3779B97F4A7C15
_BASE = 0x5851F42D4C957F2D  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)

_IS_WORD_BYTE = np.zeros(256, bool)
_IS_WORD_BYTE[128:] = True  # parts of characters beyond ASCII; their punctuation is taken out below
for _character in "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
    _IS_WORD_BYTE[ord(_character)] = True
_FIRST_UNSPACED, _LAST_UNSPACED = 0xE3, 0xE9  # leading bytes of U+3000 to U+9FFF: kana and Chinese characters
_LOWER_ASCII = np.array([byte + 32 if 65 <= byte <= 90 else byte for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class WordTable:
    """The words of a batch of documents, in order."""

    hashes: UInt64s
    """[w] The same word has the same hash everywhere, in every process and version."""
    starts: Int64s
    """[w] Byte offset of the word in the batch's UTF-8 text, all documents joined by one byte."""
    ends: Int64s
    """[w] Byte offset behind it."""
    first_words: Int64s
    """[d + 1] Index of each document's first word; the last entry is w."""
    first_bytes: Int64s
    """[d + 1] Byte offset of each document's text; the next one's is one more than this one's end."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
        """Texts must be valid Unicode."""
        parts = [text.encode() for text in texts]
        first_bytes = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) + 1 for part in parts], out=first_bytes[1:])
        folded = parts if all(map(str.isascii, texts)) else [_lower(t, p) for t, p in zip(texts, parts, strict=True)]
        data = np.frombuffer(b"\n".join(folded) + b"\n", np.uint8)
        starts, ends = _word_bounds(data)
        hashes = _hash_spans(_LOWER_ASCII[data], starts, ends)
        return cls(hashes, starts, ends, np.searchsorted(starts, first_bytes), first_bytes)

    @property
    def num_documents(self) -> int:
        return len(self.first_words) - 1

    def ngrams(self, n: int) -> tuple[UInt64s, Int64s]:
        """Hashes [g] of every n consecutive words inside one document, and the index [g] of each one's first word."""
        num = len(self.hashes) - n + 1
        if num < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        rolled = self.hashes[:num].copy()
        for k in range(1, n):
            rolled *= np.uint64(_BASE)
            rolled += self.hashes[k : k + num]
        document = np.repeat(np.arange(self.num_documents), np.diff(self.first_words))
        inside = np.flatnonzero(document[:num] == document[n - 1 :])
        return mix(rolled[inside]), inside


def mix(values: UInt64s) -> UInt64s:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a permutation of 64-bit numbers that looks random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _lower(text: str, encoded: bytes) -> bytes:
    """Lower case of the same length in bytes: the few letters that would change theirs stay as they are."""
    if text.isascii():
        return encoded
    lowered = text.lower().encode()
    if len(lowered) == len(encoded):
        return lowered
    return "".join(c.lower() if len(c.lower().encode()) == len(c.encode()) else c for c in text).encode()


def _word_bounds(data: NDArray[np.uint8]) -> tuple[Int64s, Int64s]:
    """Byte offsets of the words' starts and ends; `data` ends in a separator."""
    is_word = _IS_WORD_BYTE[data]
    _take_out_punctuation(data, is_word)
    is_first = is_word.copy()
    is_first[1:] &= ~is_word[:-1]
    unspaced = np.flatnonzero((data >= _FIRST_UNSPACED) & (data <= _LAST_UNSPACED) & is_word)
    if len(unspaced):
        is_first[unspaced] = True
        is_first[unspaced + 3] = is_word[unspaced + 3]
    starts = np.flatnonzero(is_first)
    after = np.flatnonzero(is_word[:-1] & (~is_word[1:] | is_first[1:])) + 1
    return starts, after


def _take_out_punctuation(data: NDArray[np.uint8], is_word: NDArray[np.bool_]) -> None:
    """General punctuation (U+2000 to U+206F), CJK's (U+3000 to U+303F), full-width (U+FF00 to U+FF0F), and U+00A0-BF."""
    for lead, seconds, last_third in ((0xE2, (0x80, 0x81), 0xBF), (0xE3, (0x80,), 0xBF), (0xEF, (0xBC,), 0x8F)):
        at = np.flatnonzero(data == lead)
        for second in seconds:
            found = at[(data[at + 1] == second) & (data[np.minimum(at + 2, len(data) - 1)] <= last_third)]
            for offset in range(3):
                is_word[found + offset] = False
    at = np.flatnonzero(data == 0xC2)
    is_word[at] = is_word[at + 1] = False


def _hash_spans(data: NDArray[np.uint8], starts: Int64s, ends: Int64s) -> UInt64s:
    """One hash a span: a polynomial in the base, from differences of sums over all that came before."""
    powers, inverses = _powers(1 << max(16, len(data).bit_length()))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_byte_values()[data] * powers[: len(data)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


@functools.cache
def _byte_values() -> UInt64s:
    return mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(_SEED))


@functools.lru_cache(maxsize=1)
def _powers(num: int) -> tuple[UInt64s, UInt64s]:
    """Powers [num] of the base and of its inverse modulo 2^64."""
    return _cumulative(_BASE, num), _cumulative(_INVERSE, num)


def _cumulative(base: int, num: int) -> UInt64s:
    factors = np.full(num, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
