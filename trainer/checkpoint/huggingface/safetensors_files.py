"""Safetensors files read and written tensor by tensor, by `pread` and `pwrite`.

Memory holds the tensor at hand and nothing else: with a memory map, every page that was touched would count as this
process's until the kernel wants it back.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from trainer.config import UserError

MAX_SHARD_BYTES = 5 * 10**9
"""Size from which weights are split into several files, which users can fetch in parallel."""
INDEX = "model.safetensors.index.json"
LONE_FILE = "model.safetensors"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
"""The types that are read and written, under their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library accepts

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is to be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


# ------------------------------------------------------------------------------------------------------------- writing


class FileWriter:
    """A file with all its room laid out, whose tensors are written in any order; a context manager.

    The layout is the header's length (8 bytes, little-endian), the header (JSON), and then the values.
    """

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[Entry, int]] = {}
        offset = 0
        for entry in entries:
            end = offset + entry.num_bytes
            header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
            self._places[entry.name] = entry, offset
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # so that the values are aligned
        self._start = 8 + len(encoded)
        self._handle = open(path, "wb")  # noqa: SIM115  (closed on leaving)
        self._handle.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, values: Tensor) -> None:
        entry, offset = self._places[name]
        assert (values.dtype, values.shape) == (entry.dtype, entry.shape), f"{name}: {values.dtype} {values.shape}"
        self._handle.seek(self._start + offset)
        self._handle.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


class WeightsWriter:
    """A model's weights: model.safetensors, or several files and the index that names them; a context manager."""

    def __init__(self, folder: Path, entries: Iterable[Entry], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        shards = _shards(list(entries), max_shard_bytes)
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        names = names if len(shards) > 1 else [LONE_FILE]
        self._files = ExitStack()
        self._writers: dict[str, FileWriter] = {}
        for name, shard in zip(names, shards, strict=True):
            writer = self._files.enter_context(FileWriter(folder / name, shard))
            self._writers |= dict.fromkeys((entry.name for entry in shard), writer)
        if len(shards) > 1:
            weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
            total_bytes = sum(entry.num_bytes for shard in shards for entry in shard)
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, values: Tensor) -> None:
        self._writers[name].write(name, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def _shards(entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Cut the list wherever the next tensor would make a file too large; a single larger tensor has one to itself."""
    shards: list[list[Entry]] = [[]]
    held_bytes = 0
    for entry in entries:
        if shards[-1] and held_bytes + entry.num_bytes > max_shard_bytes:
            shards.append([])
            held_bytes = 0
        shards[-1].append(entry)
        held_bytes += entry.num_bytes
    return shards


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    """First byte in the file."""
    entry: Entry


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's weights, each read when it is asked for, as they are stored."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        UserError: there are none, a file that the index names is missing, or one is damaged.
        """
        self._places: dict[str, _Place] = {}
        for path in _weight_files(folder):
            for place in _read_header(path):
                if place.entry.name in self._places:
                    raise UserError(f"{path} holds {place.entry.name}, and so does another file; fetch the model anew")
                self._places[place.entry.name] = place

    def shape(self, name: str) -> Shape:
        return self._places[name].entry.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].entry.dtype

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        values = torch.empty(place.entry.shape, dtype=place.entry.dtype)
        _read_into(values, place)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def file_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file at once."""
    found = {}
    for place in _read_header(path):
        found[place.entry.name] = torch.empty(place.entry.shape, dtype=place.entry.dtype)
        _read_into(found[place.entry.name], place)
    return found


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
            if any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise ValueError("it names files outside of the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is no index of weights: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch the model anew")
        return [folder / name for name in names]
    if (folder / LONE_FILE).is_file():
        return [folder / LONE_FILE]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read, and no safetensors; open "
            "the model with transformers where you trust it, and save it again by save_pretrained"
        )
    raise UserError(f"{folder} holds no weights: neither {LONE_FILE} nor {INDEX}; name the folder of a model")


def _read_header(path: Path) -> list[_Place]:
    try:
        with open(path, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > _LONGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(handle.read(size))
            header.pop("__metadata__", None)
            return [_place(path, 8 + size, name, entry) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); fetch the model anew") from error


def _place(path: Path, data_start: int, name: str, entry: Mapping[str, Any]) -> _Place:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}, and {', '.join(DTYPES)} are read")
    tensor = Entry(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    first, end = entry["data_offsets"]
    if end - first != tensor.num_bytes or first < 0 or data_start + end > path.stat().st_size:
        raise ValueError(f"{name} of shape {entry['shape']} lies at bytes {first} to {end}")
    return _Place(path, data_start + first, tensor)


def _read_into(values: Tensor, place: _Place) -> None:
    view: np.ndarray = values.view(-1).view(torch.uint8).numpy()
    with open(place.path, "rb", buffering=0) as handle:
        done = 0
        while done < len(view):
            got = os.preadv(handle.fileno(), [view[done:].data], place.start + done)
            if not got:
                raise OSError(f"{place.path} ends before byte {place.start + len(view)}")
            done += got
