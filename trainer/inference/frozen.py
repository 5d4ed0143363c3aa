"""A model without optimizer: weights from a checkpoint, for evaluation in any layout.

Shapes: b sequences, s sequence, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint import sharded
from trainer.checkpoint.format import compatibility
from trainer.checkpoint.format.manifest import read_manifest
from trainer.config import RunConfig
from trainer.data.batches import MicroBatch
from trainer.inference.windows import window_logits
from trainer.model.gpt import build_chunks
from trainer.pipeline import StageView, WatchLosses, run_schedule, sum_over_replicas
from trainer.progress import Advance, unheard


class FrozenModel:
    """This rank's share of a trained model."""

    def __init__(self, config: RunConfig, checkpoint: Path, device: torch.device) -> None:
        """Raises:
        UserError: the checkpoint is of another architecture.
        """
        compatibility.check_architecture(read_manifest(checkpoint), config, checkpoint)
        self.config = config
        self.chunks = build_chunks(config)
        for chunk in self.chunks:
            chunk.to(device).eval()
        sharded.load_weights(self.chunks, checkpoint)
        self.stages = [StageView(chunk, chunk) for chunk in self.chunks]

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[MicroBatch], watch: WatchLosses | None = None, advance: Advance = unheard
    ) -> tuple[float, int]:
        """Sum of token losses (nats) and number of tokens over all replicas; the same on every rank.

        `advance` hears on the ranks of the last pipeline stage how many of their micro-batches are done.
        """
        model = self.config.model
        return sum_over_replicas(
            *run_schedule(self.stages, model, micro_batches, forward_only=True, watch=watch, advance=advance)
        )

    def logits(self, tokens: Tensor) -> Tensor | None:
        """See `window_logits`."""
        return window_logits(self.stages, self.config.model, tokens)
