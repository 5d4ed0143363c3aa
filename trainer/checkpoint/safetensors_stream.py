"""Safetensors files written piece by piece.

Sources are read one at a time and their parts written straight to the files: no model is built, and memory holds one
source (a global tensor: all layers of one matrix) and a copy of one part of it.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
"""Size from which the weights are split into several files, which users can fetch in parallel."""


@dataclass(frozen=True)
class StreamedTensor:
    """One tensor of the files, fp32, and how it is read from its source."""

    name: str
    shape: tuple[int, ...]
    source: str
    read: Callable[[Tensor], Tensor]

    @property
    def num_bytes(self) -> int:
        return 4 * math.prod(self.shape)


def write_weights(
    folder: Path, sources: Mapping[str, Tensor], tensors: Sequence[StreamedTensor], max_shard_bytes: int
) -> None:
    """Write model.safetensors, or several files of at most `max_shard_bytes` and the index that names them.

    Args:
        sources: fp32. Only asked for single names, each once.
        tensors: in the order of writing; those of one source stand together.
    """
    shards = _shards(tensors, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    values = _values(sources, tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, values)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[StreamedTensor], max_shard_bytes: int) -> list[list[StreamedTensor]]:
    """Cut the list wherever the next tensor would make a file too large; a single larger tensor has one to itself."""
    shards: list[list[StreamedTensor]] = [[]]
    held_bytes = 0
    for tensor in tensors:
        if shards[-1] and held_bytes + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            held_bytes = 0
        shards[-1].append(tensor)
        held_bytes += tensor.num_bytes
    return shards


def _values(sources: Mapping[str, Tensor], tensors: Sequence[StreamedTensor]) -> Iterator[Tensor]:
    """The values of the tensors, in their order; each source is read once and let go before the next."""
    source, held = "", torch.empty(0)
    for tensor in tensors:
        if tensor.source != source:
            del held
            source, held = tensor.source, sources[tensor.source]
        value = tensor.read(held)
        assert value.dtype == torch.float32, f"{source} is {value.dtype}, not float32"
        assert value.shape == tensor.shape, f"{source} gives {tuple(value.shape)} for {tensor.name} {tensor.shape}"
        yield value


def _write_file(path: Path, tensors: Sequence[StreamedTensor], values: Iterator[Tensor]) -> None:
    """Write the header's length (8 bytes, little-endian), the header (JSON), and then the values one by one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the values are aligned
    with open(path, "wb") as handle:
        handle.write(len(encoded).to_bytes(8, "little") + encoded)
        for _ in tensors:
            handle.write(next(values).contiguous().numpy().data)
