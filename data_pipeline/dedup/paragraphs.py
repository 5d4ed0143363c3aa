"""Paragraphs: what stands between blank lines, compared without regard to case and white space."""

import re
from collections.abc import Collection, Iterator

import xxhash

_BLANK_LINES = re.compile(r"(\n\s*\n)")
_MOST_GROWTH = 3  # characters that folding the case of one may give, of any in Unicode


def paragraph_digests(text: str, min_chars: int) -> Iterator[tuple[int, bytes]]:
    """Index and xxh3-128 of every paragraph that has at least `min_chars` characters once normalised."""
    for index, paragraph in enumerate(_BLANK_LINES.split(text)[::2]):
        if _MOST_GROWTH * len(paragraph) < min_chars:
            continue
        normalized = " ".join(paragraph.casefold().split())
        if len(normalized) >= min_chars:
            yield index, xxhash.xxh3_128_digest(normalized.encode())


def remove_paragraphs(text: str, removed: Collection[int]) -> str:
    """The text without the paragraphs of these indices and the blank lines before them; empty if none is left."""
    pieces = _BLANK_LINES.split(text)
    kept = [index for index in range(0, len(pieces), 2) if index // 2 not in removed]
    return "".join("".join(pieces[max(index - 1, 0) : index + 1]) for index in kept).removeprefix(
        pieces[kept[0] - 1] if kept and kept[0] else ""
    )
