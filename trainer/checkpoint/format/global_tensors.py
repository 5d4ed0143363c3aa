"""A checkpoint's whole tensors, read one at a time with no model and no process group: for export and inspection."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.checkpoint.format.chunk_file import Chunk, Shape
from trainer.checkpoint.format.chunk_reader import ChunkReader, blocks_of, fill
from trainer.training_state import MASTER


class GlobalTensors(Mapping[str, Tensor]):
    """`tensors[name]`, fp32, of one kind of state."""

    def __init__(self, checkpoint: Path, kind: str = MASTER, index: Metadata | None = None) -> None:
        """`index` is that of `chunk_reader.read_index`, where it has been read already."""
        self._reader = ChunkReader(checkpoint, index)
        self._kind = kind
        entries = self._reader.read_metadata().state_dict_metadata
        self.shapes: dict[str, Shape] = {
            name.removeprefix(f"{kind}/"): tuple(entry.size)
            for name, entry in entries.items()
            if name.startswith(f"{kind}/") and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, (0,) * len(self.shapes[name]), self.shapes[name])

    def layer(self, name: str, layer: int) -> Tensor:
        """One layer of a tensor that stacks all of them, without the layer axis."""
        shape = self.shapes[name]
        return self._read(name, (layer, *(0 for _ in shape[1:])), (1, *shape[1:]))[0]

    def _read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        values = torch.empty(shape)
        chunk = Chunk(f"{self._kind}/{name}", self.shapes[name], offset, shape)
        fill(blocks_of([(chunk, values)]), self._reader)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
