"""The output layer and its loss in one: logits exist once, in the model's dtype, and fp32 only some rows at a time.

Shapes: s sequence, b batch, h hidden, v this tensor-parallel rank's rows of the padded vocabulary, n = s * b tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from trainer import parallel

# Rows of logits that are fp32 at the same time, in elements: a processor's cache, or enough to fill a GPU
_ELEMENTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, returning token losses (or logits) instead of this rank's part of the logits."""

    vocab_size: int
    """True rows of the whole vocabulary; rows beyond it are padding and get no probability."""

    def forward(self, hidden: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        """hidden [s, b, h] (s split under sequence parallelism), labels [b, s] -> losses in nats [b, s], fp32.

        Without labels: logits [b, s, v] of this rank, with those of padding at -inf.

        Args:
            weight: [v, h] of a tied embedding; None takes the layer's own.
        """
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)  # its backward sums the ranks' parts
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        first_row = parallel.tensor_rank() * weight.shape[0]
        num_rows = min(max(0, self.vocab_size - first_row), weight.shape[0])
        if labels is None:
            logits = hidden.transpose(0, 1) @ weight.t()
            logits[..., num_rows:] = -torch.inf
            return logits
        local_labels = labels.t().flatten() - first_row
        losses = _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, local_labels, num_rows)
        return losses.view(hidden.shape[:2]).t()


class _LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(hidden @ weight.T)[label] over the vocabulary of all tensor-parallel ranks.

    The backward pass turns the logits into their gradient in place, so that it can run once only.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, num_rows: int) -> Tensor:
        """hidden [n, h], weight [v, h], labels [n] counted from this rank's first row -> losses [n], fp32."""
        logits = hidden @ weight.t()
        log_sums = torch.empty(len(logits), device=logits.device)
        for rows, wide in _wide_rows(logits):
            wide[:, num_rows:] = -torch.inf
            highest = wide.amax(-1).clamp_(min=torch.finfo(torch.float32).min)  # finite even if all rows are padding
            log_sums[rows] = wide.sub_(highest[:, None]).exp_().sum(-1).log_().add_(highest)
        is_here = (labels >= 0) & (labels < num_rows)
        columns = labels.where(is_here, 0)
        targets = logits.gather(1, columns[:, None]).squeeze(1).float().where(is_here, 0.0)
        if parallel.tensor_size() > 1:
            every = [torch.empty_like(log_sums) for _ in range(parallel.tensor_size())]
            dist.all_gather(every, log_sums, group=parallel.tensor_group())
            log_sums = torch.stack(every).logsumexp(0)
            dist.all_reduce(targets, group=parallel.tensor_group())
        ctx.save_for_backward(hidden, weight, logits, log_sums, columns, is_here)
        ctx.num_rows = num_rows
        return log_sums - targets

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, logits, log_sums, columns, is_here = ctx.saved_tensors
        for rows, wide in _wide_rows(logits):
            wide.sub_(log_sums[rows, None]).exp_()
            wide[:, ctx.num_rows :] = 0
            wide.scatter_add_(1, columns[rows, None], -is_here[rows, None].float())
            logits[rows] = wide.mul_(gradient[rows, None])
        return logits @ weight, logits.t() @ hidden, None, None


def _wide_rows(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after another, as fp32 copies in one buffer that is used again."""
    rows_at_once = max(1, _ELEMENTS_AT_ONCE[logits.device.type] // logits.shape[1])
    buffer = torch.empty(min(rows_at_once, len(logits)), logits.shape[1], device=logits.device)
    for start in range(0, len(logits), rows_at_once):
        rows = slice(start, min(start + rows_at_once, len(logits)))
        yield rows, buffer[: rows.stop - start].copy_(logits[rows])
