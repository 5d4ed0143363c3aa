"""A checkpoint's whole tensors, read one at a time with no model and no process group: for export and inspection."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.training_state import MASTER


class GlobalTensors(Mapping[str, Tensor]):
    """Read access to a checkpoint's whole tensors, one at a time, with no process group: `tensors[name]`, fp32."""

    def __init__(self, checkpoint: Path, kind: str = MASTER) -> None:
        self._reader = FileSystemReader(checkpoint)
        self._kind = kind
        entries = self._reader.read_metadata().state_dict_metadata
        self._shapes: dict[str, tuple[int, ...]] = {
            name.removeprefix(f"{kind}/"): tuple(entry.size)
            for name, entry in entries.items()
            if name.startswith(f"{kind}/") and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it loads in a single process, which is the point
            dcp.load({f"{self._kind}/{name}": tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
