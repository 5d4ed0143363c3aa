"""Words of many documents at once, as 64-bit hashes: what deduplication, decontamination and quality rules count in.

A word is a run of letters, digits and their combining marks (Unicode categories L, N, Mn and Mc), lower-cased;
everything else only separates. Scripts that write without spaces (kana, Chinese characters) have a word per character.
Everything is arrays over a whole batch, so that a document costs no Python of its own.

Shapes: `b` bytes of the batch, `c` characters, `w` words, `d` documents.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

UInt8s = NDArray[np.uint8]
UInt64s = NDArray[np.uint64]
Int64s = NDArray[np.int64]

_BASE = np.uint64(0x5851F42D4C957F2D)  # Knuth's MMIX multiplier; odd, so that no multiple of it loses a bit
_SEPARATOR, _LETTER, _UNSPACED = range(3)  # kinds of characters; an unspaced one is a word of its own
_UNSPACED_RANGES = ((0x3000, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD))  # kana and Chinese characters
_NUM_KINDS = 0x40000  # no letters are assigned beyond
_SIGMAS = "\N{GREEK CAPITAL LETTER SIGMA}\N{GREEK SMALL LETTER FINAL SIGMA}\N{GREEK SMALL LETTER SIGMA}"
_MAX_GATHERED_BYTES = 64  # longer words (hardly ever language) are hashed one by one


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
        """Texts must be valid Unicode (no lone surrogates: UnicodeEncodeError)."""
        joined = "".join([text + "\n" for text in texts])
        first_bytes = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) + 1 for text in texts], out=first_bytes[1:])
        if joined.isascii():
            lowered = joined.encode().translate(_LOWER_ASCII)
            starts, ends = _word_bounds(np.frombuffer(lowered.translate(_ASCII_KINDS), np.uint8))
        else:
            code_points = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
            encoded = joined.encode()
            first_byte = np.flatnonzero(~_is_inner(encoded + b"\n"))  # [c + 1] of every character
            starts, ends = (first_byte[at] for at in _word_bounds(_kinds()[np.minimum(code_points, _NUM_KINDS - 1)]))
            first_bytes = first_byte[first_bytes]
            lowered = _lower(joined, encoded)
        return cls(_hash_spans(lowered, starts, ends), starts, ends, np.searchsorted(starts, first_bytes), first_bytes)

    @property
    def num_documents(self) -> int:
        return len(self.first_words) - 1

    def ngrams(self, n: int) -> tuple[UInt64s, Int64s]:
        """Hashes [g] of every n consecutive words inside one document, and the index [g] of each one's first word."""
        num = len(self.hashes) - n + 1
        if num < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        is_inside = np.ones(len(self.hashes), bool)
        last_words = (self.first_words[1:, None] - np.arange(1, n)).ravel()  # too near the end of their document
        is_inside[last_words[last_words >= 0]] = False
        inside = np.flatnonzero(is_inside[:num])
        return mix(_rolled(self.hashes, n)[inside]), inside


def mix(values: UInt64s) -> UInt64s:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a permutation of 64-bit numbers that looks random."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _rolled(hashes: UInt64s, n: int) -> UInt64s:
    """Polynomials [w - n + 1] over every n consecutive hashes, by doubling: 2k from two of k."""
    if n == 1:
        return hashes
    half = _rolled(hashes, n // 2)
    num = len(hashes) - n // 2 * 2 + 1
    whole = half[:num] * np.uint64(pow(int(_BASE), n // 2, 1 << 64)) + half[n // 2 : n // 2 + num]
    return whole if n % 2 == 0 else whole[: num - 1] * _BASE + hashes[n - 1 :]


def _word_bounds(kinds: UInt8s) -> tuple[Int64s, Int64s]:
    """Offsets of the words' starts and ends in kinds of characters [c]; the last character is a separator."""
    is_word = kinds != _SEPARATOR
    is_edge = np.empty(len(kinds), bool)  # between it and the character before, a word begins or ends, or both
    is_edge[:1] = is_word[:1]
    np.not_equal(is_word[1:], is_word[:-1], out=is_edge[1:])
    is_unspaced = kinds == _UNSPACED
    if not is_unspaced.any():
        edges = np.flatnonzero(is_edge)
        return edges[::2], edges[1::2]
    is_edge |= is_unspaced
    is_edge[1:] |= is_unspaced[:-1]
    edges = np.flatnonzero(is_edge)
    begins = np.flatnonzero(is_word[edges])
    return edges[begins], edges[begins + 1]


def _lower(text: str, encoded: bytes) -> bytes:
    """UTF-8 of the text in lower case, every character as long as before and whatever stands beside it."""
    for variant in _SIGMAS[:2]:  # which of its two lower cases a capital sigma gets depends on its neighbours
        text = text.replace(variant, _SIGMAS[2])
    lowered = text.lower().encode()
    if len(lowered) == len(encoded) and np.array_equal(_is_inner(lowered), _is_inner(encoded)):
        return lowered
    pieces = _changes_length().split(text)
    pieces[::2] = [piece.lower() for piece in pieces[::2]]
    return "".join(pieces).encode()


def _is_inner(encoded: bytes) -> NDArray[np.bool_]:
    """Which bytes [b] are not the first of their character."""
    return (np.frombuffer(encoded, np.uint8) & 0xC0) == 0x80


def _hash_spans(data: bytes, starts: Int64s, ends: Int64s) -> UInt64s:
    """One hash a span, from its bytes eight at a time; the work is on spans, not on bytes."""
    eights = np.ndarray(len(data), "<u8", data + bytes(8), strides=(1,))  # [b] overlapping: from each byte on
    lengths = ends - starts
    hashes = mix(eights[starts] & _LOW_BYTES[np.minimum(lengths, 8)])
    for num_done in range(8, _MAX_GATHERED_BYTES, 8):
        longer = np.flatnonzero(lengths > num_done)
        if not len(longer):
            return hashes
        words = eights[starts[longer] + num_done] & _LOW_BYTES[np.minimum(lengths[longer] - num_done, 8)]
        hashes[longer] = mix(hashes[longer] * _BASE ^ words)
    for word in np.flatnonzero(lengths > _MAX_GATHERED_BYTES):
        hashes[word] = xxhash.xxh3_64_intdigest(data[starts[word] : ends[word]])
    return hashes


def _kind(code_point: int) -> int:
    """Of one character; variation selectors are marks that follow pictures, not letters."""
    category = unicodedata.category(chr(code_point))
    if not (category[0] in "LN" or category in ("Mn", "Mc")) or 0xFE00 <= code_point <= 0xFE0F:
        return _SEPARATOR
    return _UNSPACED if any(first <= code_point <= last for first, last in _UNSPACED_RANGES) else _LETTER


@functools.cache
def _kinds() -> UInt8s:
    """[_NUM_KINDS] Kind of every character."""
    return np.fromiter(map(_kind, range(_NUM_KINDS)), np.uint8, _NUM_KINDS)


@functools.cache
def _changes_length() -> re.Pattern[str]:
    """The few characters whose lower case has another number of bytes, in a group, so that a split keeps them."""
    characters = (chr(code_point) for code_point in range(128, _NUM_KINDS) if not 0xD800 <= code_point < 0xE000)
    changing = (c for c in characters if len(c.lower().encode()) != len(c.encode()))
    return re.compile("([" + "".join(changing) + "])")


_ASCII_KINDS = bytes(_kind(code_point) for code_point in range(128)) + bytes(128)
_LOWER_ASCII = bytes(range(128)).lower() + bytes(range(128, 256))
_LOW_BYTES = np.array([(1 << 8 * num_bytes) - 1 for num_bytes in range(9)], np.uint64)
