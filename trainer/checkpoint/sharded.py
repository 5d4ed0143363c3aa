"""The sharded checkpoint: every rank writes the ZeRO fragments it owns, as blocks of global tensors.

No rank gathers anything, and nothing in the files depends on the layout: a load asks torch.distributed.checkpoint for
the blocks that this rank owns in its own layout. Stored are the fp32 master weights and Adam's moments, under
`<kind>/<global name>`; the weights that forward uses are derived from them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from trainer.checkpoint import store
from trainer.engine.engine import Engine
from trainer.engine.state import Fragment
from trainer.model.sharding import Shape, placements
from trainer.training_state import MASTER


def save(
    engine: Engine,
    checkpoints: Path,
    step: int,
    consumed_samples: int,
    data: Mapping[str, str] | None = None,
    stability: Mapping[str, Any] | None = None,
) -> store.Manifest:
    """Write and commit the checkpoint of `step`. Collective; on return it exists for every rank."""
    temporary = checkpoints / f"{store.folder_name(step)}.tmp"
    if dist.get_rank() == 0:
        store.begin(checkpoints, step)
    dist.barrier()
    blocks = _blocks(fragment for fragment in engine.state.fragments() if fragment.is_main)
    dcp.save(dict(blocks), storage_writer=FileSystemWriter(temporary, sync_files=True), planner=_SavePlanner())
    # each rank fingerprints what it wrote; rank 0 also the index that it wrote last
    mine = list(temporary.glob(f"__{dist.get_rank()}_*"))
    if dist.get_rank() == 0:
        mine.append(temporary / ".metadata")
    described: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(described, {path.name: store.fingerprint(path, durable=True) for path in mine})
    files = {name: facts for part in described for name, facts in part.items()}
    manifest = store.Manifest(
        step,
        consumed_samples,
        engine.config.model_dump(mode="json"),
        files,
        data=dict(data or {}),
        num_updates=engine.state.num_updates,
        stability=dict(stability or {}),
    )
    if dist.get_rank() == 0:
        store.commit(temporary, manifest)
    dist.barrier()
    return manifest


def load(engine: Engine, checkpoint: Path) -> store.Manifest:
    """Fill the engine's whole state from a checkpoint of any layout. Collective.

    Raises:
        UserError: the checkpoint is of another architecture.
    """
    manifest = store.read_manifest(checkpoint)
    store.check_architecture(manifest, engine.config, checkpoint)
    engine.state.prepare(manifest.num_updates)
    _fill(engine.state.fragments(), checkpoint)
    engine.state.refresh_weights()
    return manifest


@torch.no_grad()
def load_weights(chunks: Iterable[GPTModel], checkpoint: Path) -> None:
    """Fill the weights of a model that has no engine. Collective."""
    fragments = (
        Fragment(box, placement.is_main, {MASTER: parameter.data.view(-1)[box.flat_slice].view(box.shape)})
        for parameter, placement in placements(chunks).items()
        for box in placement.boxes
    )
    _fill(fragments, checkpoint)


def _fill(fragments: Iterable[Fragment], checkpoint: Path) -> None:
    dcp.load(dict(_blocks(fragments)), storage_reader=FileSystemReader(checkpoint), planner=_LoadPlanner())


class _Blocks:
    """The blocks of one global tensor that this rank reads or writes, in the form DCP asks for."""

    def __init__(self, global_shape: Shape) -> None:
        self.global_shape = torch.Size(global_shape)
        self.tensors: dict[torch.Size, Tensor] = {}  # by offset

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, tensor.size()) for offset, tensor in self.tensors.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=torch.float32)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.global_shape),
            )
            for number, chunk in enumerate(self.__create_chunk_list__())
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.tensors[index.offset]


def _blocks(fragments: Iterable[Fragment]) -> dict[str, _Blocks]:
    blocks: dict[str, _Blocks] = {}
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            of_tensor = blocks.setdefault(f"{kind}/{fragment.box.key}", _Blocks(fragment.box.global_shape))
            of_tensor.tensors[torch.Size(fragment.box.offset)] = tensor
    return blocks


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Keep our blocks as they are: the default walks into the dict and copies it."""
        self.flatten_state_dict = False
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
