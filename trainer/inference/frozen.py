"""A model without optimizer: weights from a checkpoint, for evaluation in any layout.

Shapes: b sequences, s sequence, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import parallel
from trainer.checkpoint import sharded
from trainer.checkpoint.format import compatibility
from trainer.checkpoint.format.manifest import read_manifest
from trainer.config import RunConfig
from trainer.data.batches import MicroBatch
from trainer.model.context_parallel import local_positions
from trainer.model.gpt import build_chunks
from trainer.pipeline import StageView, run_schedule, sum_over_replicas


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
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Sum of token losses (nats) and number of tokens over all replicas; the same on every rank."""
        return sum_over_replicas(*run_schedule(self.stages, self.config.model, micro_batches, forward_only=True))

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """tokens [b, s] -> logits [b, s, V], fp32, on the ranks of the last pipeline stage; None on the others."""
        found: list[Tensor] = []

        def keep(layer: torch.nn.Module, inputs: tuple[Any, ...], losses: Tensor) -> None:
            hidden, _, weight = inputs
            if not found:  # the copies below give the same
                found.append(layer.forward(hidden, None, weight))  # without labels it returns logits

        hooks = [chunk.output_layer.register_forward_hook(keep) for chunk in self.chunks if chunk.post_process]
        # the schedule moves activations between stages; the losses it computes beside the logits are not used
        padded = torch.nn.functional.pad(tokens, (0, 1))
        copies = parallel.pipeline_size() if len(self.stages) > 1 else 1  # interleaving wants whole rounds
        run_schedule(self.stages, self.config.model, [MicroBatch(padded)] * copies, forward_only=True)
        for hook in hooks:
            hook.remove()
        if not found:
            return None
        shard = found[0].float()  # [b, s / context ranks, V / tensor ranks]
        rows = torch.cat(parallel.gather(shard, parallel.tensor_group()), dim=-1)[..., : self.config.model.vocab_size]
        whole = rows.new_empty(*tokens.shape, rows.shape[-1])
        for rank, part in enumerate(parallel.gather(rows, parallel.context_group())):
            whole[:, local_positions(tokens.shape[1], rank, parallel.context_size())] = part
        return whole
