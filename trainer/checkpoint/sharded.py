"""The training state of a rank, written to a file of its own and read back at any layout.

Every rank writes the ZeRO fragments that it owns, as blocks of global tensors (`chunk_file`): no gather, no
communication. To load, a rank takes its own file if that holds exactly its blocks, as it does in the layout that wrote
it, and else asks `torch.distributed.checkpoint` which parts of which files make them up.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from trainer import parallel
from trainer.checkpoint.format.chunk_file import Chunk, file_name, lay_out, read_layout
from trainer.checkpoint.format.chunk_reader import ChunkReader, OpenFiles, blocks_of, fill, read_index
from trainer.checkpoint.format.compatibility import check_architecture
from trainer.checkpoint.format.manifest import Manifest, read_manifest
from trainer.engine.engine import Engine
from trainer.engine.state import Fragment
from trainer.model.sharding import placements
from trainer.training_state import MASTER

Blocks = list[tuple[Chunk, Tensor]]

_PINNED_ELEMENTS = 16 << 20  # 64 MB
_BLOCK_BYTES = 512  # of st_blocks, see stat(2)


@torch.no_grad()
def write(engine: Engine, path: Path) -> int:
    """Write this rank's share of the training state; returns the bytes of the file.

    The file gets all its room before anything is copied, so that a full disk or memory is an error, not a signal. One
    that is there already, of the same size, is written over: its pages need not be made again.

    Raises:
        OSError: there is no room.
    """
    blocks = _blocks(engine.state.fragments())
    layout = lay_out(chunk for chunk, _ in blocks)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, layout.num_bytes)
        if os.fstat(descriptor).st_blocks * _BLOCK_BYTES < layout.num_bytes:  # asking again walks over all its pages
            os.posix_fallocate(descriptor, 0, layout.num_bytes)
        _write_at(descriptor, memoryview(layout.header), 0)
        for (_, tensor), start in zip(blocks, layout.starts, strict=True):
            for position, values in _on_host(tensor):
                _write_at(descriptor, values, start + position)
    finally:
        os.close(descriptor)
    return layout.num_bytes


def _on_host(tensor: Tensor) -> Iterator[tuple[int, memoryview]]:
    """(first byte, bytes) of the parts of a tensor; what is on a GPU comes through a small pinned buffer."""
    flat = tensor.reshape(-1)
    if flat.device.type == "cpu":
        yield 0, memoryview(flat.numpy().data).cast("B")
        return
    buffer = torch.empty(min(flat.numel(), _PINNED_ELEMENTS), dtype=flat.dtype, pin_memory=True)
    for first in range(0, flat.numel(), _PINNED_ELEMENTS):
        part = flat[first : first + _PINNED_ELEMENTS]
        yield first * flat.element_size(), memoryview(buffer[: part.numel()].copy_(part).numpy().data).cast("B")


def _write_at(descriptor: int, content: memoryview, position: int) -> None:
    """By system call: a mapped file takes three times as long, most of it for the faults of its pages."""
    while content:
        written = os.pwrite(descriptor, content, position)
        content, position = content[written:], position + written


def load(engine: Engine, checkpoint: Path) -> Manifest:
    """Fill the engine's whole state from a checkpoint of any layout. Collective.

    Raises:
        UserError: the checkpoint is of another architecture.
    """
    manifest = read_manifest(checkpoint)
    check_architecture(manifest, engine.config, checkpoint)
    engine.state.prepare(manifest.num_updates)
    _load(_blocks(engine.state.fragments()), checkpoint)
    engine.state.refresh_weights()
    return manifest


def load_initial_weights(engine: Engine, checkpoint: Path) -> None:
    """Fill the engine's weights, and begin everything else anew. Collective.

    Raises:
        UserError: the checkpoint is of another architecture.
    """
    check_architecture(read_manifest(checkpoint), engine.config, checkpoint)
    engine.state.prepare(0)
    _load([block for block in _blocks(engine.state.fragments()) if _is_weight(block[0])], checkpoint)
    engine.state.refresh_weights()


@torch.no_grad()
def load_weights(chunks: Iterable[GPTModel], checkpoint: Path) -> None:
    """Fill the weights of a model that has no engine. Collective."""
    fragments = (
        Fragment(box, placement.is_main, {MASTER: parameter.data.view(-1)[box.flat_slice].view(box.shape)})
        for parameter, placement in placements(chunks).items()
        for box in placement.boxes
    )
    _load(_blocks(fragments), checkpoint)


def _is_weight(chunk: Chunk) -> bool:
    return chunk.name.startswith(f"{MASTER}/")


def _blocks(fragments: Iterable[Fragment]) -> Blocks:
    def each() -> Iterator[tuple[Chunk, Tensor]]:
        for fragment in fragments:
            box = fragment.box
            for kind, tensor in fragment.tensors.items():
                name = f"{kind}/{box.key}"
                yield Chunk(name, box.global_shape, box.offset, box.shape, not fragment.is_main), tensor

    return list(each())


def _load(blocks: Blocks, checkpoint: Path) -> None:
    (num_complete,) = parallel.sum_over_ranks(int(_load_own(blocks, checkpoint)))
    if num_complete == dist.get_world_size():
        return
    index = [read_index(checkpoint) if dist.get_rank() == 0 else None]  # thousands of files are opened by one rank
    dist.broadcast_object_list(index, src=0)
    fill(blocks_of(blocks), ChunkReader(checkpoint, index[0]))


def _load_own(blocks: Blocks, checkpoint: Path) -> bool:
    """Fill the blocks from the file that this rank wrote; whether it holds all of them."""
    name = file_name(dist.get_rank())
    if not (checkpoint / name).is_file():
        return False
    layout = read_layout(checkpoint / name)
    starts = dict(zip(layout.chunks, layout.starts, strict=True))
    if not all(chunk in starts for chunk, _ in blocks):
        return False
    with OpenFiles(checkpoint) as files:
        for chunk, tensor in blocks:
            files.read_into(tensor, name, starts[chunk])
    return True
