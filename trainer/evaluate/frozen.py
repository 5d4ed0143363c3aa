"""A model without optimizer: weights from a checkpoint, for evaluation in any layout.

Shapes: b sequences, s sequence, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import parallel
from trainer.checkpoint import sharded, store
from trainer.config import RunConfig
from trainer.data import MicroBatch
from trainer.model.gpt import build_chunks
from trainer.pipeline import StageView, run_schedule, sum_over_replicas


class FrozenModel:
    """This rank's share of a trained model."""

    def __init__(self, config: RunConfig, checkpoint: Path, device: torch.device) -> None:
        """Raises:
        UserError: the checkpoint is of another architecture.
        """
        store.check_architecture(store.read_manifest(checkpoint), config, checkpoint)
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

        def keep(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
            found.append(output[0].clone())  # the loss that follows overwrites them

        hooks = [chunk.output_layer.register_forward_hook(keep) for chunk in self.chunks if chunk.post_process]
        # the schedule moves activations between stages; the loss it computes beside the logits is not used
        padded = torch.nn.functional.pad(tokens, (0, 1))
        copies = parallel.pipeline_size() if len(self.stages) > 1 else 1  # interleaving wants whole rounds
        run_schedule(self.stages, self.config.model, [MicroBatch(padded)] * copies, forward_only=True)
        for hook in hooks:
            hook.remove()
        if not found:
            return None
        local = found[0].transpose(0, 1).float().contiguous()  # [b, s, V / tensor ranks]
        shards = [torch.empty_like(local) for _ in range(parallel.tensor_size())]
        dist.all_gather(shards, local, group=parallel.tensor_group())
        return torch.cat(shards, dim=-1)[..., : self.config.model.vocab_size]
