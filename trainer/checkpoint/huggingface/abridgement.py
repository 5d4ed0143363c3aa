"""A model cut down to a few layers, as a checkpoint and as an export, so that both can be opened where it cannot."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.huggingface.checkpoint_weights import CheckpointWeights, CheckpointWriter
from trainer.checkpoint.huggingface.configs import write_configs
from trainer.checkpoint.huggingface.families.choice import family_of
from trainer.checkpoint.huggingface.safetensors_files import Entry, StoredTensors, WeightsWriter
from trainer.config import ModelConfig, ParallelConfig, RunConfig


@dataclass(frozen=True)
class Abridged:
    """Some layers between the model's own embeddings and output layer."""

    layers: Sequence[int]
    config: RunConfig
    """On one rank, in fp32."""
    checkpoint: Path
    export: Path


def abridge(folder: Path, checkpoint: Path, config: RunConfig, seed: int, out: Path, num_pairs: int) -> Abridged:
    """Cut a checkpoint and its export in `folder` down to the same layers, into `out`. Streamed as the export was."""
    layers = kept_layers(config.model.num_layers, seed, num_pairs)
    short = _on_one_rank(config, config.model.model_copy(update={"num_layers": len(layers)}))
    family, export = family_of(short.model), out / "export"
    export.mkdir(parents=True)
    stored, weights = StoredTensors(folder), CheckpointWeights(checkpoint)
    dtype = stored.dtype(next(iter(stored)))
    slabs = family.slabs(short.model, write_configs(export, family, short.model, None, dtype))
    writer = CheckpointWriter(store.begin(out, 0), short.model, slabs)
    with WeightsWriter(export, [Entry(part.name, part.shape, dtype) for slab in slabs for part in slab.parts]) as files:
        for slab in slabs:
            original = slab if slab.layer is None else replace(slab, layer=layers[slab.layer])
            writer.write(slab, weights.read(original))
            for part in slab.parts:
                files.write(part.name, stored[part.row.theirs.format(layer=original.layer)])
    committed = writer.commit(Manifest(0, 0, short.model_dump(mode="json"), origin=str(checkpoint)))
    return Abridged(layers, short, committed, export)


def kept_layers(num_layers: int, seed: int, num_pairs: int) -> list[int]:
    """The first pair of neighbours (one dense and one banded where they alternate) and others by the seed, in order.

    All layers of a model that has no more than those.
    """
    if num_layers <= 2 * num_pairs:
        return list(range(num_layers))
    others = random.Random(seed).sample(range(1, num_layers // 2), num_pairs - 1)
    return [layer for pair in sorted([0, *others]) for layer in (2 * pair, 2 * pair + 1)]


def _on_one_rank(config: RunConfig, model: ModelConfig) -> RunConfig:
    train = config.train.model_copy(update={"precision": "fp32", "micro_batch_size": 1, "transformer_engine": False})
    launch = config.launch.model_copy(update={"nodes": 1, "ranks_per_node": None})
    changes = {"model": model, "train": train, "parallel": ParallelConfig(), "launch": launch}
    return config.model_copy(update=changes)
