"""Logits of whole windows, through megatron-core's schedule: in every layout that trains, and so of the training engine
too, whose weights may be split in ways that no cache of keys and values follows.

Shapes: b sequences, s sequence, h hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import parallel
from trainer.config import ModelConfig
from trainer.data.batches import MicroBatch
from trainer.model.context_parallel import local_positions
from trainer.pipeline import StageView, run_schedule


@torch.no_grad()
def window_logits(stages: Sequence[StageView], model: ModelConfig, tokens: Tensor) -> Tensor | None:
    """tokens [b, s] -> logits [b, s, V], fp32, on the ranks of the last pipeline stage; None on the others.

    Collective over the replica; with ZeRO-3 over all replicas. s is the model's context.
    """
    found: list[Tensor] = []

    def keep(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden, _, weight = inputs
        if not found:  # the copies below give the same
            found.append(layer.forward(hidden, None, weight))  # without labels it returns logits

    last = [stage.module.output_layer for stage in stages if stage.module.post_process]
    # before the layer is called: afterwards ZeRO-3 has let go of its weights
    hooks = [layer.register_forward_pre_hook(keep) for layer in last]
    # the schedule moves activations between stages; the losses it computes beside the logits are not used
    padded = torch.nn.functional.pad(tokens, (0, 1))
    copies = parallel.pipeline_size() if len(stages) > 1 else 1  # interleaving wants whole rounds
    try:
        run_schedule(stages, model, [MicroBatch(padded)] * copies, forward_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None
    shard = found[0].float()  # [b, s / context ranks, V / tensor ranks]
    rows = torch.cat(_gathered(shard, parallel.tensor_group()), dim=-1)[..., : model.vocab_size]
    whole = rows.new_empty(*tokens.shape, rows.shape[-1])
    for rank, part in enumerate(_gathered(rows, parallel.context_group())):
        whole[:, local_positions(tokens.shape[1], rank, parallel.context_size())] = part
    return whole


def _gathered(mine: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's tensor of this shape, in order of rank."""
    mine = mine.contiguous()
    tensors = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(tensors, mine, group=group)
    return tensors
