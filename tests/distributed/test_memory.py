"""Training for longer takes no more memory."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from data_pipeline.shards import ShardWriter, TokenBatch
from ranks import run_on_ranks
from trainer import loop
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.run_dir import RunDir

SEQ, VOCAB, BATCH = 64, 120, 4
WARM_UP, MEASURED = 50, 200
LIMIT_BYTES = 8 << 20  # the allocator settles within 4 MB; losses that kept their graphs would take 55 MB


def write_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(5)
    for name in ("train", "heldout"):
        with ShardWriter(folder / name, VOCAB, end_of_text_id=0) as writer:
            writer.add(TokenBatch.of([draw.integers(1, VOCAB, 50 * SEQ).astype(np.uint16)]))
            writer.finish()
            writer.commit()


def test_memory_does_not_grow_with_steps(tmp_path: Path) -> None:
    config = from_tree(
        {
            "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "vocab_size": VOCAB, "seq_length": SEQ},
            "train": {
                "total_tokens": (WARM_UP + MEASURED) * BATCH * SEQ,
                "global_batch_size": BATCH,
                "micro_batch_size": 2,
                "precision": "fp32",
            },
            "checkpoint": {"every_steps": 10**6},
        }
    )
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(config)
    write_data(run_dir.data)

    def rank(config: RunConfig, device: torch.device) -> dict[int, int]:
        resident: dict[int, int] = {}

        def measure(kind: str, **fields: Any) -> None:
            if kind == "step":
                resident[fields["step"]] = psutil.Process().memory_info().rss

        loop.train(config, run_dir, device, measure)
        return resident

    (resident,) = run_on_ranks(config, rank)
    assert set(resident) == set(range(1, WARM_UP + MEASURED + 1))
    assert resident[WARM_UP + MEASURED] - resident[WARM_UP] < LIMIT_BYTES
