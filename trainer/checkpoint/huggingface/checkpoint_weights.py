"""The weights of a checkpoint, slab by slab: read for an export, written for an import."""

import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import Chunk, FileLayout, file_name, incomplete, lay_out, read_layout
from trainer.checkpoint.format.chunk_reader import read_index
from trainer.checkpoint.format.global_tensors import GlobalTensors
from trainer.checkpoint.format.manifest import Manifest, fingerprint
from trainer.checkpoint.huggingface.families.family import Slab
from trainer.checkpoint.huggingface.rounding import MISSES
from trainer.checkpoint.huggingface.safetensors_files import MAX_SHARD_BYTES
from trainer.config import ModelConfig
from trainer.progress import Advance, unheard
from trainer.training_state import MASTER


class CheckpointWeights:
    """Master weights, read from a checkpoint of any layout with no process group."""

    def __init__(self, checkpoint: Path) -> None:
        index = read_index(checkpoint)
        self._masters = GlobalTensors(checkpoint, MASTER, index)
        self._misses = GlobalTensors(checkpoint, MISSES, index)

    def read(self, slab: Slab) -> Tensor:
        """fp32, without a layer axis."""
        return _read(self._masters, slab)

    def misses(self, slab: Slab) -> Tensor | None:
        """By how much ours miss theirs, of which they were made; int8, in the shape of theirs. None: by nothing."""
        return _read(self._misses, slab).to(torch.int8) if slab.ours in self._misses.shapes else None


def _read(tensors: GlobalTensors, slab: Slab) -> Tensor:
    return tensors[slab.ours] if slab.layer is None else tensors.layer(slab.ours, slab.layer)


class CheckpointWriter:
    """A checkpoint of weights alone, written slab by slab: `begin`, `write` each slab, `commit`."""

    def __init__(
        self, folder: Path, model: ModelConfig, slabs: Iterable[Slab], max_file_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """`folder` is one that `store.begin` made."""
        self._folder, self._model = folder, model
        self._places: dict[Chunk, tuple[Path, int]] = {}
        chunks = [chunk for slab in slabs for chunk in _chunks(slab, model)]
        for number, layout in enumerate(_layouts(chunks, max_file_bytes)):
            path = folder / file_name(number)
            path.write_bytes(layout.header)
            os.truncate(path, layout.num_bytes)
            self._places |= {chunk: (path, start) for chunk, start in zip(layout.chunks, layout.starts, strict=True)}

    def write(self, slab: Slab, values: Tensor, misses: Tensor | None = None) -> None:
        """`values` in the shape of ours; `misses` in that of the part that is rounded, unless there are none."""
        for chunk, tensor in zip(_chunks(slab, self._model), (values, misses), strict=False):
            if tensor is None:
                continue
            assert tensor.numel() == chunk.numel
            path, start = self._places[chunk]
            with open(path, "r+b") as handle:
                handle.seek(start)
                handle.write(tensor.float().contiguous().view(-1).numpy().data)

    def commit(self, facts: Manifest, advance: Advance = unheard) -> Path:
        """Make the checkpoint exist.

        Args:
            facts: all that the manifest says but the files and the kinds of state.
            advance: hears how many of its files are on the disk, and hashed.
        """
        paths, files = sorted(self._folder.iterdir()), {}
        for path in paths:
            files[path.name] = fingerprint(path, durable=True)
            advance(len(files), len(paths))
        lacking = incomplete([read_layout(self._folder / name) for name in files])
        assert lacking is None, lacking
        kinds = list(dict.fromkeys(chunk.name.partition("/")[0] for chunk in self._places))
        return store.commit(self._folder, replace(facts, files=files, kinds=kinds, written_at=time.time()))


def _chunks(slab: Slab, model: ModelConfig) -> list[Chunk]:
    """The block of ours and, where a part is rounded, that of its misses."""
    chunks = [_chunk(f"{MASTER}/{slab.ours}", slab.shape(model), slab.layer, model)]
    rounded = [part for part in slab.parts if part.is_rounded(model)]
    assert len(rounded) < 2
    return chunks + [_chunk(f"{MISSES}/{slab.ours}", part.shape, slab.layer, model) for part in rounded]


def _chunk(name: str, shape: tuple[int, ...], layer: int | None, model: ModelConfig) -> Chunk:
    origin = (0,) * len(shape)
    if layer is None:
        return Chunk(name, shape, origin, shape)
    return Chunk(name, (model.num_layers, *shape), (layer, *origin), (1, *shape))


def _layouts(chunks: list[Chunk], max_file_bytes: int) -> Iterable[FileLayout]:
    held: list[Chunk] = []
    for chunk in chunks:
        if held and sum(each.num_bytes for each in held) + chunk.num_bytes > max_file_bytes:
            yield lay_out(held)
            held = []
        held.append(chunk)
    yield lay_out(held)
