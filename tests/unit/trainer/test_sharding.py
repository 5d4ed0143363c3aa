"""Cutting a flat range out of a block of a global tensor, against numpy's own row-major order."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.model.sharding import Box


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    offset = [draw(st.integers(0, 5)) for _ in shape]
    room = [draw(st.integers(0, 3)) for _ in shape]
    global_shape = tuple(o + n + more for o, n, more in zip(offset, shape, room, strict=True))
    return Box("key", global_shape, tuple(offset), tuple(shape), draw(st.integers(0, 50)))


def elements(box: Box) -> np.ndarray:
    """The flat index in the global tensor of every element of the box, in the order in which the box stores them."""
    numbers = np.arange(np.prod(box.global_shape)).reshape(box.global_shape)
    return numbers[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].flatten()


def stored(box: Box) -> np.ndarray:
    """A local parameter around the box: the global number of each element, -1 where others lie."""
    local = np.full(box.flat_start + box.numel + 20, -1)
    local[box.flat_slice] = elements(box)
    return local


@given(box=boxes(), start=st.integers(0, 1400), length=st.integers(0, 1400))
def test_a_flat_range_is_covered_once_by_blocks_that_hold_what_lies_there(box: Box, start: int, length: int) -> None:
    local = stored(box)
    start = start % len(local)
    end = min(start + length, len(local))
    parts = list(box.cut(start, end))
    position = max(start, box.flat_start)
    for part in parts:
        assert (part.key, part.global_shape) == (box.key, box.global_shape)
        assert part.numel > 0 and part.flat_start == position  # in order, without gap or overlap
        assert np.array_equal(elements(part), local[part.flat_slice])
        position += part.numel
    covered = [number for part in parts for number in elements(part)]
    assert covered == [number for number in local[start:end] if number >= 0]
    assert len(parts) <= 2 * len(box.shape) - 1


@given(box=boxes(), cuts=st.lists(st.integers(0, 1300), max_size=6))
def test_consecutive_ranges_share_out_the_whole_box(box: Box, cuts: list[int]) -> None:
    """As data-parallel ranks do with a parameter under ZeRO."""
    borders = [0, *sorted(cuts), box.flat_start + box.numel + 7]
    parts = [part for start, end in pairwise(borders) for part in box.cut(start, end)]
    assert [number for part in parts for number in elements(part)] == elements(box).tolist()


@given(boxes())
def test_the_whole_range_is_the_box_itself(box: Box) -> None:
    assert list(box.cut(0, box.flat_start + box.numel)) == [box]
    assert list(box.cut(box.flat_start, box.flat_start + box.numel)) == [box]
    assert list(box.cut(0, box.flat_start)) == list(box.cut(box.flat_slice.stop, box.flat_slice.stop + 5)) == []


def test_an_example_by_hand() -> None:
    """A 3 x 4 block that starts at (10, 20): elements 2 to 9 are half a row, one row, and the first two of the next."""
    box = Box("key", (100, 100), (10, 20), (3, 4), 5)
    assert list(box.cut(7, 15)) == [
        Box("key", (100, 100), (10, 22), (1, 2), 7),
        Box("key", (100, 100), (11, 20), (1, 4), 9),
        Box("key", (100, 100), (12, 20), (1, 2), 13),
    ]
