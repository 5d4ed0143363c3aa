"""What is left of a document once its overlaps with evaluation texts are cut out."""

from collections.abc import Iterable

from trainer.data_config import DecontaminateConfig


def cut(text: str, spans: Iterable[tuple[int, int]], config: DecontaminateConfig) -> tuple[list[str], int]:
    """Pieces that stay, without white space at their ends, and the number of cuts.

    `spans` are overlaps, characters [first, end), in any order. No piece stays of a document that falls into more than
    `max_pieces`; short ones, which are dropped, count too.
    """
    pieces, at, num_cuts = [], 0, 0
    for first, end in _widened(spans, config.window_chars):
        pieces.append(text[at : max(0, first)].strip())
        at, num_cuts = end, num_cuts + 1
    pieces.append(text[at:].strip())
    pieces = [piece for piece in pieces if piece]
    if len(pieces) > config.max_pieces:
        return [], num_cuts
    return [piece for piece in pieces if len(piece) >= config.min_piece_chars], num_cuts


def _widened(spans: Iterable[tuple[int, int]], window: int) -> list[tuple[int, int]]:
    """Spans with a window on each side, those that touch as one, in order."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted((first - window, end + window) for first, end in spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((first, end))
    return merged
