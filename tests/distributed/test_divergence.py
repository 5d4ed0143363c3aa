"""A run that diverges stops and says so; it never goes on with weights that are not numbers, nor saves them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.shards import ShardWriter
from ranks import run_on_ranks
from trainer import loop
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.run_dir import RunDir

VOCAB_SIZE = 64


def write_data(folder: Path) -> None:
    draw = np.random.default_rng(5)
    folder.mkdir(parents=True)
    for split in ("train", "heldout"):
        writer = ShardWriter(folder / split, VOCAB_SIZE, 0)
        writer.add([draw.integers(1, VOCAB_SIZE, 100).astype(np.uint16) for _ in range(20)])
        writer.finish()
        writer.commit()


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    config = from_tree(
        {
            "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": VOCAB_SIZE, "seq_length": 16},
            "train": {"total_tokens": 10 * 4 * 16, "global_batch_size": 4, "precision": "fp32"},
            "optimizer": {"lr": 1e30},
            "checkpoint": {"every_steps": 100},
        }
    )
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config)
    write_data(run_dir.data)
    events: list[tuple[str, dict[str, object]]] = []

    def rank(config: RunConfig, device: torch.device) -> object:
        with pytest.raises(FloatingPointError, match=r"step \d+ has loss nan.*lower optimizer.lr"):
            loop.train(config, run_dir, device, lambda kind, **fields: events.append((kind, fields)))
        return events

    (recorded,) = run_on_ranks(config, rank)
    assert all(np.isfinite(fields["loss"]) for kind, fields in recorded if kind == "step")
    assert list(run_dir.checkpoints.iterdir()) == []
