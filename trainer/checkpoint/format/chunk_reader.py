"""Reading checkpoints: torch.distributed.checkpoint plans what is needed from which of the files.

    dcp.load(state_dict, storage_reader=ChunkReader(checkpoint), planner=..., no_dist=True)

Nothing is unpickled, and memory holds one block at a time beside what is asked for.
"""

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from trainer.checkpoint.format.chunk_file import Chunk, Shape, incomplete, read_layout
from trainer.checkpoint.format.manifest import read_manifest
from trainer.config import UserError


@dataclass(frozen=True)
class StoredChunk:
    """Where a chunk lies."""

    file: str
    start: int
    """First byte."""
    shape: Shape


def read_index(checkpoint: Path) -> Metadata:
    """What lies where in a checkpoint, from the headers of its files; copies are left out.

    Raises:
        UserError: it has no manifest, a file's header is damaged, or the files do not hold every element once.
    """
    layouts = {}
    for file in read_manifest(checkpoint).files:
        try:
            layouts[file] = read_layout(checkpoint / file)
        except OSError as error:
            raise UserError(f"{checkpoint} is damaged: {file} cannot be read ({error.strerror})") from error
    lacking = incomplete(list(layouts.values()))
    if lacking:
        raise UserError(f"{checkpoint} is damaged: {lacking}")
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, StoredChunk] = {}
    for file, layout in layouts.items():
        for chunk, start in zip(layout.chunks, layout.starts, strict=True):
            if chunk.is_copy or not chunk.numel:  # an empty one would take the place of another with its offset
                continue
            entry = tensors.setdefault(chunk.name, _tensor_entry(chunk))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)))
            places[MetadataIndex(chunk.name, torch.Size(chunk.offset))] = StoredChunk(file, start, chunk.shape)
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _tensor_entry(chunk: Chunk) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(chunk.global_shape), [])


class ChunkReader(StorageReader):
    """DCP's way into a checkpoint."""

    def __init__(self, checkpoint: Path, index: Metadata | None = None) -> None:
        """`index` is that of `read_index`, where somebody has read it already."""
        self._checkpoint = checkpoint
        self._index = index

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self._index = self._index or read_index(self._checkpoint)
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with OpenFiles(self._checkpoint) as files:
            for item in plan.items:
                place = self.read_metadata().storage_data[item.storage_index]
                values = files.read(place, tuple(item.storage_offsets), tuple(item.lengths))
                target = planner.resolve_tensor(item).detach()
                target.copy_(values)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


class OpenFiles:
    """The files of a checkpoint, each opened once; a context manager."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, place: StoredChunk, offset: Shape, shape: Shape) -> Tensor:
        """The block of a chunk that begins at `offset` in it; reads no more than the rows that hold it."""
        start, count, rows = _extent(place.shape, offset, shape)
        values = torch.from_numpy(self._floats(place.file, place.start + 4 * start, count)).view(rows)
        for axis, (first, size) in enumerate(zip(offset, shape, strict=True)):
            if values.shape[axis] != size:
                values = values.narrow(axis, first, size)
        return values

    def read_into(self, target: Tensor, file: str, start: int) -> None:
        """Fill a tensor with consecutive values of a file, from byte `start` on."""
        target.copy_(torch.from_numpy(self._floats(file, start, target.numel())).view(target.shape))

    def _floats(self, file: str, start: int, count: int) -> np.ndarray:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self._checkpoint / file, os.O_RDONLY)
        values = np.empty(count, dtype="<f4")
        if not count:
            return values
        view, done = memoryview(values.data).cast("B"), 0
        while done < len(view):
            got = os.preadv(self._descriptors[file], [view[done:]], start + done)
            if not got:
                raise OSError(f"{self._checkpoint / file} ends before byte {start + len(view)}")
            done += got
        return values


def _extent(whole: Shape, offset: Shape, shape: Shape) -> tuple[int, int, Shape]:
    """The shortest run of elements that holds a block: its start, its length, and its shape.

    Axes before the first one of which more than one row is wanted are fixed; the axes after it are read as a whole.
    """
    axis = next((axis for axis, size in enumerate(shape) if size != 1), max(len(shape) - 1, 0))
    strides = [math.prod(whole[after + 1 :]) for after in range(len(whole))]
    start = sum(offset[before] * strides[before] for before in range(min(axis + 1, len(whole))))
    rows = (*shape[: axis + 1], *whole[axis + 1 :])
    return start, math.prod(rows), rows


class Blocks:
    """Blocks of one global tensor to be filled, in the form DCP asks for."""

    def __init__(self, global_shape: Shape) -> None:
        self.global_shape = torch.Size(global_shape)
        self.tensors: dict[torch.Size, Tensor] = {}  # by offset

    def size(self) -> torch.Size:
        return self.global_shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, tensor.size()) for offset, tensor in self.tensors.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.tensors[index.offset]


class _Planner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Keep our blocks as they are: the default walks into the dict and copies it."""
        self.flatten_state_dict = False
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def fill(blocks: Mapping[str, Blocks], reader: ChunkReader) -> None:
    """Fill blocks, by tensor name, from a checkpoint. Each rank for itself: nothing is communicated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it loads in a single process, which is the point
        dcp_load(dict(blocks), storage_reader=reader, planner=_Planner(), no_dist=True)


def blocks_of(chunks: Iterable[tuple[Chunk, Tensor]]) -> dict[str, Blocks]:
    blocks: dict[str, Blocks] = {}
    for chunk, tensor in chunks:
        of_tensor = blocks.setdefault(chunk.name, Blocks(chunk.global_shape))
        of_tensor.tensors[torch.Size(chunk.offset)] = tensor
    return blocks
