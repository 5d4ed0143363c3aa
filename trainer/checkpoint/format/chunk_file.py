"""One rank's part of a checkpoint: a safetensors file of blocks of global tensors, which describes itself.

Every block is an fp32 tensor under a name that says what it is of and where it lies there, as a slice:

    master/decoder.layers.mlp.linear_fc1.weight[3:4,0:512,0:128]

and the file's `__metadata__` gives the shape of every global tensor. Nothing else is needed to find any element, so
ranks write their files without asking each other, and any reader of safetensors can open them. A name that begins with
`copy:` is a block that another rank's file holds too, and is not counted when a checkpoint is put together: with it a
rank finds in its own file all that it keeps.

The tensors begin at a multiple of the page size, so that files can be copied past the page cache.
"""

import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import orjson

from trainer.config import UserError
from trainer.training_state import STATE_KINDS

PAGE_BYTES = 4096
_ITEM_BYTES = 4
_COPY = "copy:"
_GLOBAL_SHAPES = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes; what readers of safetensors accept
_MOST_AXES = 8
_LONGEST_AXIS = 2**63 - 1  # what torch can count
_LONGEST_REASON = 300  # characters of an error, which quotes the file

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A block of a global fp32 tensor."""

    name: str
    """Kind of state and key of the weight: `exp_avg/decoder.final_layernorm.weight`."""
    global_shape: Shape
    offset: Shape
    shape: Shape
    is_copy: bool = False
    """Whether another rank's file holds it too and speaks for it."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return _ITEM_BYTES * self.numel

    @property
    def label(self) -> str:
        """Its name in the file."""
        slices = ",".join(f"{first}:{first + size}" for first, size in zip(self.offset, self.shape, strict=True))
        return f"{_COPY if self.is_copy else ''}{self.name}[{slices}]"


@dataclass(frozen=True)
class FileLayout:
    """Where chunks lie in a file."""

    header: bytes
    chunks: tuple[Chunk, ...]
    starts: tuple[int, ...]
    """First byte of each chunk in the file."""

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.starts[-1] + self.chunks[-1].num_bytes if self.chunks else len(self.header)


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def lay_out(chunks: Iterable[Chunk]) -> FileLayout:
    """The layout of a new file with these chunks, in their order."""
    chunks, position = tuple(chunks), 0
    entries: dict[str, object] = {
        _GLOBAL_SHAPES: {chunk.name: ",".join(map(str, chunk.global_shape)) for chunk in chunks},
    }
    ends: list[int] = []
    for chunk in chunks:
        extent = [position, position + chunk.num_bytes]
        assert chunk.label not in entries, f"{chunk.label} comes twice"
        entries[chunk.label] = {"dtype": "F32", "shape": chunk.shape, "data_offsets": extent}
        position = extent[1]
        ends.append(position)
    content = orjson.dumps(entries)
    content += b" " * (-(8 + len(content)) % PAGE_BYTES)
    assert len(content) < _LONGEST_HEADER
    header = struct.pack("<Q", len(content)) + content
    starts = tuple(len(header) + end - chunk.num_bytes for end, chunk in zip(ends, chunks, strict=True))
    return FileLayout(header, chunks, starts)


def read_layout(path: Path) -> FileLayout:
    """The layout of a file, without its tensors.

    Raises:
        UserError: it is not such a file, or not as long as it says.
    """
    try:
        with open(path, "rb") as file:
            num_bytes, length = os.fstat(file.fileno()).st_size, file.read(8)
            size = struct.unpack("<Q", length)[0]
            if size > min(_LONGEST_HEADER, num_bytes - len(length)):
                raise ValueError(f"it has {num_bytes} bytes and says that {size} of them are its header")
            content = file.read(size)
            layout = _parse(length + content, orjson.loads(content))
            if layout.num_bytes != num_bytes:
                raise ValueError(f"it has {num_bytes} bytes and says {layout.num_bytes}")
            return layout
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not part of a checkpoint: {' '.join(what.split())[:_LONGEST_REASON]}") from error


def _parse(header: bytes, entries: dict[str, dict[str, object]]) -> FileLayout:
    """Nothing but what `lay_out` makes: the blocks fill the file without gaps, and none shares bytes with another."""
    shapes = {name: _global_shape(str(sizes)) for name, sizes in entries.pop(_GLOBAL_SHAPES).items()}
    found: list[tuple[list[int], Chunk]] = []
    for label, entry in entries.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{label} is {entry['dtype']}, not F32")
        chunk = _chunk_of(label, shapes)
        if list(chunk.shape) != entry["shape"]:
            raise ValueError(f"{label} has shape {entry['shape']}")
        found.append((entry["data_offsets"], chunk))  # type: ignore[arg-type]
    starts, position = [], 0
    found.sort(key=lambda each: each[0])
    for extent, chunk in found:
        if extent != [position, position + chunk.num_bytes]:
            raise ValueError(f"{chunk.label} should begin at {position} and have {chunk.num_bytes} bytes, not {extent}")
        starts.append(len(header) + position)
        position += chunk.num_bytes
    return FileLayout(header, tuple(chunk for _, chunk in found), tuple(starts))


def _chunk_of(label: str, shapes: dict[str, Shape]) -> Chunk:
    name, _, slices = label.removesuffix("]").rpartition("[")
    is_copy, name = name.startswith(_COPY), name.removeprefix(_COPY)
    bounds = [tuple(map(int, each.split(":"))) for each in slices.split(",")] if slices else []
    offset, ends = tuple(first for first, _ in bounds), tuple(end for _, end in bounds)
    shape = tuple(end - first for first, end in bounds)
    fits = len(bounds) == len(shapes[name]) and all(end <= size for end, size in zip(ends, shapes[name], strict=True))
    if not fits or min((*offset, *shape), default=0) < 0:
        raise ValueError(f"{label} lies outside of {shapes[name]}")
    chunk = Chunk(name, shapes[name], offset, shape, is_copy)
    if chunk.label != label:  # Python reads more spellings of a number than one
        raise ValueError(f"{label} is spelt otherwise than {chunk.label}")
    return chunk


def _global_shape(text: str) -> Shape:
    shape = tuple(map(int, text.split(","))) if text else ()
    if len(shape) > _MOST_AXES or not all(0 < size <= _LONGEST_AXIS for size in shape):
        raise ValueError(f"no tensor has the shape {text}")
    return shape


def incomplete(layouts: Sequence[FileLayout]) -> str | None:
    """What the files of one checkpoint, put together, lack or hold twice; None if they are whole.

    Exact: blocks cover a tensor once everywhere if and only if their corners, counted positive or negative by the
    number of upper ends, add up to the corners of the tensor. (The count of corners is the mixed difference of how
    often each element is covered, and only zero has the difference zero.)
    """
    found: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    corners: dict[str, Counter[Shape]] = {}
    for chunk in (chunk for layout in layouts for chunk in layout.chunks):
        if chunk.name not in shapes:
            shapes[chunk.name], found[chunk.name] = chunk.global_shape, 0
            corners[chunk.name] = Counter()
            _count_corners(corners[chunk.name], (0,) * len(chunk.global_shape), chunk.global_shape, -1)
        if shapes[chunk.name] != chunk.global_shape:
            return f"{chunk.name} has shape {shapes[chunk.name]} in one file and {chunk.global_shape} in another"
        if not chunk.is_copy:
            found[chunk.name] += chunk.numel
            _count_corners(corners[chunk.name], chunk.offset, chunk.shape, 1)
    for name, shape in shapes.items():
        if found[name] != math.prod(shape):
            return f"{name} has {found[name]} of {math.prod(shape)} elements"
        if any(corners[name].values()):
            return f"{name} has some of its elements twice and lacks others"
    return _missing_kind(shapes)


def _count_corners(counts: Counter[Shape], offset: Shape, shape: Shape, sign: int) -> None:
    for upper in product((0, 1), repeat=len(shape)):
        corner = tuple(first + end * size for first, end, size in zip(offset, upper, shape, strict=True))
        counts[corner] += -sign if sum(upper) % 2 else sign


def _missing_kind(names: Iterable[str]) -> str | None:
    """A weight that lacks a kind of state which others have: no block of it is left to count."""
    kinds: dict[str, set[str]] = {}
    for name in names:
        kind, _, key = name.partition("/")
        if kind in STATE_KINDS:  # others belong to some weights alone
            kinds.setdefault(key, set()).add(kind)
    every = {kind for of_key in kinds.values() for kind in of_key}
    lacking = [f"{kind}/{key}" for key, of_key in kinds.items() for kind in sorted(every - of_key)]
    return f"{lacking[0]} has no elements" if lacking else None
