"""The tensors of checkpoints looked at and compared, a bounded part at a time: layouts and sizes do not matter."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.checkpoint.format.chunk_file import Chunk, Shape
from trainer.checkpoint.format.chunk_reader import ChunkReader, blocks_of, fill

_PART_ELEMENTS = 1 << 24  # 64 MB of fp32


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that two checkpoints do not hold alike."""

    name: str
    """Kind of state and key of the weight."""
    shapes: tuple[Shape | None, Shape | None]
    """In each; None where it is missing."""
    num_different: int = 0
    """Elements of which any bit differs; counted, like what follows, where the shapes are the same."""
    max_abs: float = 0.0
    """Largest difference of two elements; infinite where one of them is no number."""
    relative: float = 0.0
    """L2 norm of the difference over that of the first tensor."""

    @property
    def badness(self) -> tuple[bool, float, float]:
        """To sort by."""
        return self.shapes[0] != self.shapes[1], self.relative, self.max_abs


@dataclass(frozen=True)
class Statistics:
    """Of the elements of a tensor that are finite, but for their number."""

    num_elements: int
    num_not_finite: int
    norm: float
    """L2."""
    mean: float
    smallest: float
    largest: float


def compare(first: Path, second: Path, kind: str | None = None) -> Iterator[TensorDifference | None]:
    """Every tensor of two checkpoints, or of one kind of state: its difference, or None where there is none.

    Raises:
        UserError: one of the checkpoints is damaged.
    """
    readers = ChunkReader(first), ChunkReader(second)
    shapes = _shapes(readers[0]), _shapes(readers[1])
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if kind and not name.startswith(f"{kind}/"):
            continue
        found = shapes[0].get(name), shapes[1].get(name)
        if found[0] is None or found[0] != found[1]:
            yield TensorDifference(name, found)
        else:
            yield _compare(readers, name, found[0])


def _compare(readers: tuple[ChunkReader, ChunkReader], name: str, shape: Shape) -> TensorDifference | None:
    num_different, max_abs, of_difference, of_first = 0, 0.0, 0.0, 0.0
    for offset, part in parts(shape):
        a, b = (_read(reader, Chunk(name, shape, offset, part)) for reader in readers)
        of_first += float(a.double().square().sum())
        unequal = int((a.view(torch.int32) != b.view(torch.int32)).sum())
        if unequal:
            num_different += unequal
            apart = (a.double() - b).abs().nan_to_num_(nan=math.inf)
            max_abs = max(max_abs, float(apart.max()))
            of_difference += float(apart.square().sum())
    if not num_different:
        return None
    relative = math.sqrt(of_difference / of_first) if of_first > 0 else math.inf if of_difference else 0.0
    return TensorDifference(name, (shape, shape), num_different, max_abs, relative)


def statistics(checkpoint: Path, name: str) -> Statistics:
    """Of one tensor, by kind of state and key of the weight.

    Raises:
        UserError: the checkpoint is damaged.
        KeyError: it has no such tensor.
    """
    reader = ChunkReader(checkpoint)
    shape = _shapes(reader)[name]
    num_finite, total, squares, smallest, largest = 0, 0.0, 0.0, math.inf, -math.inf
    for offset, part in parts(shape):
        values = _read(reader, Chunk(name, shape, offset, part)).double().view(-1)
        values = values[values.isfinite()]
        if not values.numel():
            continue
        num_finite += values.numel()
        total, squares = total + float(values.sum()), squares + float(values.square().sum())
        smallest, largest = min(smallest, float(values.min())), max(largest, float(values.max()))
    num_elements = math.prod(shape)
    mean = total / num_finite if num_finite else math.nan
    return Statistics(num_elements, num_elements - num_finite, math.sqrt(squares), mean, smallest, largest)


def parts(shape: Shape, most_elements: int = _PART_ELEMENTS) -> Iterator[tuple[Shape, Shape]]:
    """Offset and shape of consecutive parts of a tensor, none of more than `most_elements`: rows, or parts of rows."""
    if math.prod(shape) <= most_elements:
        yield (0,) * len(shape), shape
        return
    rows = most_elements // math.prod(shape[1:])
    for first in range(0, shape[0], max(rows, 1)):
        if rows:
            yield (first, *(0 for _ in shape[1:])), (min(rows, shape[0] - first), *shape[1:])
        else:
            yield from (((first, *offset), (1, *part)) for offset, part in parts(shape[1:], most_elements))


def _shapes(reader: ChunkReader) -> dict[str, Shape]:
    entries = reader.read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _read(reader: ChunkReader, chunk: Chunk) -> Tensor:
    values = torch.empty(chunk.shape)
    fill(blocks_of([(chunk, values)]), reader)
    return values
