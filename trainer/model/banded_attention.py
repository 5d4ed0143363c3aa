"""Banded attention: each position sees itself and the w - 1 before it; cost and memory are linear in the sequence.

Every block of w queries sees two blocks of keys: its own, causally, and the one before, from the other side. Turned
round, that other triangle is causal too, so that two calls of a causal kernel do, without any mask.

Shapes: b batch, n heads, m key-value heads (m divides n), s sequence, d head size, w window, g = b * n, k blocks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_causal = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_causal_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_banded(query: Tensor, key: Tensor, value: Tensor, window: int, dropout: float) -> Tensor:
    """query [b, n, s, d], key and value [b, m, s, d] -> [b, n, s, d]."""
    if query.is_cuda and dropout == 0:
        mask = _block_mask(query.shape[2], window)
        return _flex_attention()(query, key, value, block_mask=mask, enable_gqa=key.shape[1] != query.shape[1])
    b, n, s, d = query.shape
    if key.shape[1] != n:
        key, value = (tensor.repeat_interleave(n // key.shape[1], dim=1) for tensor in (key, value))
    blocks = -(-s // window)  # the last is filled up with positions that no query of the sequence sees
    query, key, value = (
        F.pad(tensor, (0, 0, 0, blocks * window - s)).reshape(b * n, blocks, window, d)
        for tensor in (query, key, value)
    )
    if dropout > 0 or query.is_cuda:
        context = _masked_blocks(query, key, value, dropout)
    else:
        context = _TwoTriangles.apply(query, key, value)
    return context.reshape(b, n, blocks * window, d)[:, :, :s]


class _TwoTriangles(torch.autograd.Function):
    """The two calls, their results weighed by the share of the softmax's denominator that each has seen.

    Backward, each call gets the whole result and denominator, and so finds its part of the whole gradient: attention
    over parts of the keys, as in Dao 2023 (arXiv:2307.08691), section 3.1.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All [g, k, w, d]."""
        context, log_sum = _causal(query, key, value, 0.0, True)  # log_sum [g, k, w]
        if query.shape[2] > 1:
            before, log_sum_before = (part.flip(2) for part in _causal(*_blocks_before(query, key, value), 0.0, True))
            own, own_log_sum = context[:, 1:, :-1], log_sum[:, 1:, :-1]  # what sees the block before: views
            total = torch.logaddexp(own_log_sum, log_sum_before)
            shares = [(part - total).exp().unsqueeze(-1) for part in (own_log_sum, log_sum_before)]
            own.copy_(own * shares[0] + before * shares[1])
            own_log_sum.copy_(total)
        ctx.save_for_backward(query, key, value, context, log_sum)
        return context

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, context, log_sum = ctx.saved_tensors
        whole = _causal_backward(gradient, query, key, value, context, log_sum, 0.0, True)
        if query.shape[2] > 1:
            gradient, context, log_sum = (tensor[:, 1:, :-1].flip(2) for tensor in (gradient, context, log_sum))
            parts = _causal_backward(gradient, *_blocks_before(query, key, value), context, log_sum, 0.0, True)
            targets = whole[0][:, 1:, :-1], whole[1][:, :-1, 1:], whole[2][:, :-1, 1:]
            for target, part in zip(targets, parts, strict=True):
                target += part.flip(2)
        return whole


def _blocks_before(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all blocks but the first, with keys and values of the block before, last position first.

    Query i sees key j of the block before if j > i. Of w positions, the last query and the first key see nothing; of
    the others, turned round, query i' sees key j' if j' <= i'.
    """
    return query[:, 1:, :-1].flip(2), key[:, :-1, 1:].flip(2), value[:, :-1, 1:].flip(2)


def _masked_blocks(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """With dropout, for which the causal kernel has no room: a [w, 2w] mask over both blocks. All [g, k, w, d]."""
    blocks, window = query.shape[1:3]
    key, value = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t], dim=2) for t in (key, value))
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(-window, window, device=query.device)
    seen = (column <= row) & (column > row - window)
    seen = torch.stack([seen & (column >= 0), *[seen] * (blocks - 1)])  # nothing lies before the first block
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout)


@cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _block_mask(seq_length: int, window: int, device: str = "cuda") -> Any:
    """FlexAttention's mask: which blocks of scores are not empty, and a rule for those that are not full."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    return create_block_mask(seen, None, None, seq_length, seq_length, device=device)
