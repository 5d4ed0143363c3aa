"""Real checkpoints of made-up tensors, written with no model, engine or process group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import Chunk, Shape, file_name, lay_out
from trainer.checkpoint.format.manifest import Manifest, fingerprint
from trainer.config import RunConfig

Arrays = Mapping[str, np.ndarray]
"""Kind of state and key of the weight (`master/decoder.final_layernorm.weight`) -> the whole tensor, fp32."""

Files = Sequence[Sequence[Chunk]]
"""What each rank's file holds."""


def write_checkpoint(checkpoints: Path, step: int, tensors: Arrays, files: int | Files = 1, **facts: Any) -> Path:
    """Commit a checkpoint of these tensors.

    Args:
        files: how many, among which every tensor is spread, or what each of them holds.
        facts: of the manifest, where they should be others: `config=`, `heldout_loss=`.
    """
    temporary = store.begin(checkpoints, step)
    for rank, chunks in enumerate(spread(tensors, files) if isinstance(files, int) else files):
        write_file(temporary / file_name(rank), chunks, tensors)
    written = {path.name: fingerprint(path) for path in sorted(temporary.iterdir())}
    manifest = Manifest(step, step * 16, RunConfig().model_dump(mode="json"), files=written, num_updates=step)
    return store.commit(temporary, replace(manifest, **facts))


def write_file(path: Path, chunks: Sequence[Chunk], tensors: Arrays) -> None:
    """One rank's file, with the values that the whole tensors have at its chunks."""
    path.write_bytes(file_content(chunks, tensors))


def file_content(chunks: Sequence[Chunk], tensors: Arrays) -> bytes:
    values = (np.ascontiguousarray(tensors[chunk.name][place_of(chunk)], "<f4").tobytes() for chunk in chunks)
    return lay_out(chunks).header + b"".join(values)


def fail_to_read(path: Path) -> Path:
    """Have a file answer with EIO, as one of a file system that is away; returns where its content lies meanwhile."""
    aside = path.rename(path.with_name(f"{path.name}.aside"))
    path.symlink_to("/proc/self/mem")  # no page is mapped at address 0
    return aside


def place_of(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(chunk.offset, chunk.shape, strict=True))


def spread(tensors: Arrays, num_files: int) -> list[list[Chunk]]:
    """Each tensor in two along every axis that can be halved, dealt to the files in turn."""
    files: list[list[Chunk]] = [[] for _ in range(num_files)]
    turn = 0
    for name, tensor in tensors.items():
        cuts = [sorted({0, size // 2, size}) for size in tensor.shape]
        for offset, shape in boxes(cuts):
            files[turn % num_files].append(Chunk(name, tensor.shape, offset, shape))
            turn += 1
    return files


def boxes(cuts: Sequence[Sequence[int]]) -> Iterator[tuple[Shape, Shape]]:
    """Offset and shape of every box of the grid with these cuts, the ends among them, along each axis."""
    for box in product(*map(pairwise, cuts)):
        yield tuple(first for first, _ in box), tuple(end - first for first, end in box)
