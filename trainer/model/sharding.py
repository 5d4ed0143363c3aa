"""Where this rank's parameters lie in the global model.

Every parameter is a list of boxes: blocks of global tensors, named the same in every layout. Layers of equal shape
are one global tensor with a leading layer axis. Initialisation, checkpoints and export all speak in these names.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A block of a global tensor, stored row-major from element `flat_start` of a local parameter."""

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    flat_start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def flat_slice(self) -> slice:
        """Where the box lies in the flattened local parameter."""
        return slice(self.flat_start, self.flat_start + self.numel)

    def cut(self, start: int, end: int) -> Iterator["Box"]:
        """The part of this box that a flat range [start, end) of the local parameter covers, as boxes.

        A row-major range of an n-d block is at most 2n - 1 blocks: a ragged head, whole rows, a ragged tail, and the
        head and tail cut the same way one dimension further in.
        """
        first, last = max(start, self.flat_start), min(end, self.flat_start + self.numel)
        for offset, shape, flat in _range_blocks(self.shape, first - self.flat_start, last - self.flat_start):
            corner = tuple(mine + theirs for mine, theirs in zip(self.offset, offset, strict=True))
            yield Box(self.key, self.global_shape, corner, shape, self.flat_start + flat)


@dataclass(frozen=True)
class Placement:
    """The boxes of one parameter; `is_main` on the one model-parallel rank that speaks for copies of it."""

    boxes: tuple[Box, ...]
    is_main: bool


def placements(chunks: Iterable[GPTModel]) -> dict[torch.nn.Parameter, Placement]:
    """Every parameter of this rank. Must run before DeepSpeed wraps (and ZeRO-3 empties) the parameters."""
    found: dict[torch.nn.Parameter, Placement] = {}
    for chunk in chunks:
        by_address = {parameter.data_ptr(): parameter for parameter in chunk.parameters()}
        for entry in _leaves(chunk.sharded_state_dict(prefix="")):
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or entry.data is None:
                continue
            parameter = by_address.get(entry.data.data_ptr())
            if parameter is not None:
                found[parameter] = _placement(parameter, entry)
        missing = [name for name, parameter in chunk.named_parameters() if parameter not in found]
        assert not missing, f"megatron-core's sharded state leaves out {missing}"
    return found


def _placement(parameter: torch.nn.Parameter, entry: ShardedTensor | ShardedTensorFactory) -> Placement:
    parts = list(_leaves(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    boxes = tuple(
        Box(
            key=part.key,
            global_shape=tuple(part.global_shape),
            offset=tuple(part.global_offset),
            shape=(1,) * part.prepend_axis_num + tuple(part.local_shape),
            flat_start=(part.data.data_ptr() - parameter.data_ptr()) // parameter.element_size(),
        )
        for part in parts
    )
    replica = parts[0].replica_id
    # the last component counts data-parallel copies, which ZeRO splits; the others are copies within one model
    is_main = not any(replica[:-1]) if isinstance(replica, tuple) else True
    return Placement(boxes, is_main)


def _range_blocks(shape: Shape, start: int, end: int) -> Iterator[tuple[Shape, Shape, int]]:
    """(offset, shape, flat start) of the blocks that make up the flat range [start, end) of a row-major `shape`."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,), start
        return
    inner = math.prod(shape[1:])
    first_row, end_row = -(-start // inner), end // inner  # rows that lie in the range as a whole
    if first_row > end_row:  # the range lies inside one row
        yield from _row_blocks(shape, end_row, start, end)
        return
    if start < first_row * inner:
        yield from _row_blocks(shape, first_row - 1, start, first_row * inner)
    if first_row < end_row:
        origin = (0,) * (len(shape) - 1)
        yield (first_row, *origin), (end_row - first_row, *shape[1:]), first_row * inner
    if end_row * inner < end:
        yield from _row_blocks(shape, end_row, end_row * inner, end)


def _row_blocks(shape: Shape, row: int, start: int, end: int) -> Iterator[tuple[Shape, Shape, int]]:
    """`_range_blocks` of a range that lies inside one row."""
    base = row * math.prod(shape[1:])
    for offset, block, flat in _range_blocks(shape[1:], start - base, end - base):
        yield (row, *offset), (1, *block), base + flat


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree
