"""Context parallelism by Ulysses (Jacobs et al. 2023, arXiv:2309.14509): every rank holds a part of each sequence, and
attention trades heads for whole sequences, so that it is the same computation as on one rank.

The parts are megatron-core's: 2c pieces, of which rank r of c holds the r-th from the start and the r-th from the end.

Shapes: s sequence, c context-parallel ranks, b batch, n heads, d head size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def local_positions(seq_length: int, rank: int, size: int) -> slice | Tensor:
    """Positions [s / c] in the sequence of what `rank` holds, in order."""
    if size == 1:
        return slice(None)
    pieces = torch.arange(seq_length).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[-1 - rank]])


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s / c, b, n, d] of this rank -> [s, b, n / c, d] in order of position."""
    return _TradeHeadsForSequence.apply(x, group)


def scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, b, n / c, d] in order of position -> [s / c, b, n, d] of this rank."""
    return _TradeSequenceForHeads.apply(x, group)


class _TradeHeadsForSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _heads_to_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sequence_to_heads(gradient, ctx.group), None


class _TradeSequenceForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sequence_to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _heads_to_sequence(gradient, ctx.group), None


def _heads_to_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    c = group.size()
    s, b, n, d = x.shape
    sent = x.view(s, b, c, n // c, d).permute(2, 0, 1, 3, 4).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    early, late = received.chunk(2, dim=1)  # each [c, s / 2, b, n / c, d]; late pieces come in falling order
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def _sequence_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    c = group.size()
    s, b, n, d = x.shape
    early, late = x.view(2, c, s // (2 * c), b, n, d).unbind()
    sent = torch.cat([early, late.flip(0)], dim=1)  # [c, s / c, b, n, d]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.permute(1, 2, 0, 3, 4).reshape(s // c, b, c * n, d)
