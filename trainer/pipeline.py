"""Driving the model: megatron-core's pipeline schedules over this rank's chunks, for training and for evaluation.

One code path serves every layout: no pipeline, 1F1B and interleaved are the same call.

Shapes: b micro-batch, s sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from trainer import parallel
from trainer.config import ModelConfig
from trainer.data.batches import MicroBatch
from trainer.model.context_parallel import local_positions
from trainer.progress import Advance, unheard

Forward = Callable[..., Tensor]
WatchLosses = Callable[[MicroBatch, Tensor], None]
"""Told the token losses (nats) of a micro-batch, [b, s / context ranks], fp32, 0 where a sequence does not count."""


class StageView(torch.nn.Module):
    """What megatron-core's schedule sees as one model chunk: it calls it and reads the chunk's attributes."""

    module: GPTModel
    _forward: Forward

    def __init__(self, chunk: GPTModel, forward: Forward) -> None:
        super().__init__()
        # not by assignment, which would register the chunk, and so its parameters, a second time
        self.__dict__.update(module=chunk, _forward=forward)
        self.config = chunk.config
        self.model_type = chunk.model_type
        self.vp_stage = chunk.vp_stage
        self.ddp_config = SimpleNamespace(use_megatron_fsdp=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(*args, **kwargs)

    def set_input_tensor(self, tensor: Tensor) -> None:
        self.module.set_input_tensor(tensor)


def run_schedule(
    stages: Sequence[StageView],
    model: ModelConfig,
    micro_batches: Sequence[MicroBatch],
    *,
    forward_only: bool,
    watch: WatchLosses | None = None,
    advance: Advance = unheard,
) -> tuple[Tensor, Tensor]:
    """Forward (and backward) over all micro-batches of this replica.

    Gradients are of the mean loss per token of each micro-batch, averaged over micro-batches. `watch` is told of each
    micro-batch on the last pipeline stage, and of none on the others.

    Args:
        advance: hears on the last pipeline stage of how many micro-batches the loss is known.

    Returns:
        The sum of token losses (nats) and the number of tokens, over this replica's micro-batches, fp64 scalars.
        They are real on the last pipeline stage and zero on the others; see `sum_over_replicas`.
    """
    sums: list[Tensor] = []
    micro_batch_size = micro_batches[0].tokens.shape[0]
    mine = local_positions(model.seq_length, parallel.context_rank(), parallel.context_size())
    positions = torch.arange(model.seq_length, device=micro_batches[0].tokens.device).expand(micro_batch_size, -1)

    def forward_step(batches: Iterator[MicroBatch], stage: StageView) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        inputs, labels = (part[:, mine].contiguous() for part in (batch.tokens[:, :-1], batch.tokens[:, 1:]))
        losses = stage(inputs, positions[:, mine], None, labels=labels)

        def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, None]:  # [b, s]
            # The 3-tuple form: the schedule divides by tokens and micro-batches. Its 2-tuple form scales gradients
            # by the context-parallel size, which clipping would hide from the loss.
            losses = losses.float()
            weighted = losses if batch.weight is None else losses * batch.weight.unsqueeze(-1)
            sequences = losses.new_full((), losses.shape[0]) if batch.weight is None else batch.weight.sum()
            count = (sequences * losses.shape[1]).int()
            total = weighted.sum()
            # copied before returning: the schedule divides `total` in place
            sums.append(torch.stack([total.detach().double(), count.double()]))
            if watch is not None:
                watch(batch, weighted.detach())
            advance(len(sums), len(micro_batches))
            return total, count, None

        return losses, loss_function

    iterators = [iter(micro_batches) for _ in stages]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(stages) > 1 else iterators[0],
        model=list(stages) if len(stages) > 1 else stages[0],
        num_microbatches=len(micro_batches),
        seq_length=model.seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    total, count = torch.stack(sums).sum(0) if sums else positions.new_zeros(2, dtype=torch.float64)
    return total, count


def sum_over_replicas(total: Tensor, count: Tensor) -> tuple[float, int]:
    """Add up `run_schedule`'s result over data-parallel replicas; the same answer on every rank."""
    both = torch.stack([total, count])
    add_up(both)
    return both[0].item(), int(both[1].item())


def add_up(sums: Tensor) -> None:
    """Add up in place, over data-parallel replicas, what the last stage has; the same answer on every rank."""
    dist.all_reduce(sums, group=parallel.data_group())
    if parallel.pipeline_size() > 1:
        dist.broadcast(sums, src=parallel.last_stage_rank(), group=parallel.pipeline_group())
