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
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from trainer.config import UserError

PAGE_BYTES = 4096
_ITEM_BYTES = 4
_COPY = "copy:"
_GLOBAL_SHAPES = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes; what readers of safetensors accept

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
            length = file.read(8)
            size = struct.unpack("<Q", length)[0]
            if size > _LONGEST_HEADER:
                raise ValueError("its header is too long")
            content = file.read(size)
            layout = _parse(length + content, orjson.loads(content))
            if layout.num_bytes != path.stat().st_size:
                raise ValueError(f"it has {path.stat().st_size} bytes and says {layout.num_bytes}")
            return layout
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is not part of a checkpoint: {error}") from error


def _parse(header: bytes, entries: dict[str, dict[str, object]]) -> FileLayout:
    shapes = {name: _numbers(str(sizes)) for name, sizes in entries.pop(_GLOBAL_SHAPES).items()}
    chunks, starts = [], []
    for label, entry in entries.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{label} is {entry['dtype']}, not F32")
        chunk = _chunk_of(label, shapes)
        first, end = entry["data_offsets"]  # type: ignore[misc]
        if list(chunk.shape) != entry["shape"] or end - first != chunk.num_bytes:  # type: ignore[has-type]
            raise ValueError(f"{label} has shape {entry['shape']}")
        chunks.append(chunk)
        starts.append(len(header) + first)  # type: ignore[has-type]
    order = sorted(range(len(chunks)), key=starts.__getitem__)
    return FileLayout(header, tuple(chunks[n] for n in order), tuple(starts[n] for n in order))


def _chunk_of(label: str, shapes: dict[str, Shape]) -> Chunk:
    name, _, slices = label.removesuffix("]").rpartition("[")
    is_copy, name = name.startswith(_COPY), name.removeprefix(_COPY)
    bounds = [tuple(map(int, each.split(":"))) for each in slices.split(",")] if slices else []
    offset, ends = tuple(first for first, _ in bounds), tuple(end for _, end in bounds)
    shape = tuple(end - first for first, end in bounds)
    fits = len(bounds) == len(shapes[name]) and all(end <= size for end, size in zip(ends, shapes[name], strict=True))
    if not fits or min((*offset, *shape), default=0) < 0:
        raise ValueError(f"{label} lies outside of {shapes[name]}")
    return Chunk(name, shapes[name], offset, shape, is_copy)


def _numbers(sizes: str) -> Shape:
    return tuple(map(int, sizes.split(","))) if sizes else ()


def incomplete(layouts: Sequence[FileLayout]) -> str | None:
    """What the files of one checkpoint, put together, lack or hold twice; None if they are whole.

    By the number of elements: blocks are cut from disjoint shares, so that one too few or too many shows in the sum.
    """
    found: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    for chunk in (chunk for layout in layouts for chunk in layout.chunks):
        if shapes.setdefault(chunk.name, chunk.global_shape) != chunk.global_shape:
            return f"{chunk.name} has shape {shapes[chunk.name]} in one file and {chunk.global_shape} in another"
        if not chunk.is_copy:
            found[chunk.name] = found.get(chunk.name, 0) + chunk.numel
    for name, shape in shapes.items():
        if found.get(name, 0) != math.prod(shape):
            return f"{name} has {found.get(name, 0)} of {math.prod(shape)} elements"
    return None
