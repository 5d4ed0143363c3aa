"""Checkpoints of given weights, without ranks."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.huggingface.checkpoint_weights import CheckpointWriter
from trainer.checkpoint.huggingface.configs import shapes_of
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.config import RunConfig


def write_checkpoint(checkpoints: Path, config: RunConfig, weights: Mapping[str, Tensor], step: int = 1) -> Path:
    """A checkpoint of weights alone under their global names, those of all layers stacked: [L, ...]."""
    family = family_of(config.model)
    slabs = family.slabs(config.model, shapes_of(family, config.model))
    assert {slab.ours for slab in slabs} == weights.keys()
    writer = CheckpointWriter(store.begin(checkpoints, step), config.model, slabs, max_file_bytes=50_000)
    for slab in slabs:
        writer.write(slab, weights[slab.ours] if slab.layer is None else weights[slab.ours][slab.layer])
    return writer.commit(Manifest(step, step * config.train.global_batch_size, config.model_dump(mode="json")))
