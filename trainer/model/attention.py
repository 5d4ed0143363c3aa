"""Core attention for megatron-core layers: dense or banded, whole or context parallel; never a [s, s] tensor.

Shapes: s sequence, b batch, n heads of this tensor-parallel rank, m key-value heads (m divides n), d head size,
w window.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from trainer import parallel
from trainer.model.context_parallel import gather_sequence, scatter_sequence


class CausalAttention(torch.nn.Module):
    """Causal scaled-dot-product attention over the whole sequence or, in banded layers, over a window of it.

    Stands where megatron-core's `DotProductAttention` would; takes its arguments, ignores its masks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self" and softmax_scale is None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        is_banded = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if is_banded else None  # megatron-core's counts others only
        self.context_group = parallel.context_group() if config.context_parallel_size > 1 else None
        self.stream_is_own = config.sequence_parallel  # megatron-core then runs whole layers in the stream we want

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, m, d] -> [s, b, n * d]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        dropout = self.dropout if self.training else 0.0
        if self.context_group is not None:
            query, key, value = (gather_sequence(tensor, self.context_group) for tensor in (query, key, value))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        # Heads differ between tensor-parallel ranks, so dropout draws from the stream that differs too. To enter that
        # stream twice would lose its place when activations are recomputed.
        with get_cuda_rng_tracker().fork() if dropout > 0 and not self.stream_is_own else nullcontext():
            context = attend(query, key, value, self.window, dropout)
        context = context.permute(2, 0, 1, 3)
        if self.context_group is not None:
            context = scatter_sequence(context, self.context_group)
        return context.reshape(*context.shape[:2], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, window: int | None, dropout: float = 0.0) -> Tensor:
    """Causal attention of query [b, n, s, d] to key and value [b, m, s, d]; returns [b, n, s, d].

    Args:
        window: how many positions each sees, its own included; None for all before it.
    """
    grouped = query.shape[1] != key.shape[1]
    if window is None or window >= query.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
    if query.is_cuda and dropout == 0:
        return _flex_attention()(query, key, value, block_mask=_band_mask(query.shape[2], window), enable_gqa=grouped)
    return _attend_in_blocks(query, key, value, window, dropout)


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, window: int, dropout: float) -> Tensor:
    """Banded attention as one batch of small dense ones: w queries see their own block of keys and the one before.

    Cost and memory grow with s * w. Sequences are padded to whole blocks; no query that counts sees the padding.
    """
    b, n, s, d = query.shape
    if key.shape[1] != n:
        key, value = (tensor.repeat_interleave(n // key.shape[1], dim=1) for tensor in (key, value))
    blocks = -(-s // window)
    query, key, value = (F.pad(t, (0, 0, 0, blocks * window - s)) for t in (query, key, value))
    query, key, value = (t.reshape(b * n, blocks, window, d) for t in (query, key, value))
    key, value = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t], dim=2) for t in (key, value))
    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(-window, window, device=query.device)
    seen = (column <= row) & (column > row - window)  # [w, 2w]
    seen = torch.stack([seen & (column >= 0), *[seen] * (blocks - 1)])  # nothing lies before the first block
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout)
    return context.reshape(b, n, blocks * window, d)[:, :, :s]


@cache
def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _band_mask(seq_length: int, window: int) -> Any:
    """FlexAttention's mask of a banded layer on CUDA: a list of the blocks that are not empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    return create_block_mask(seen, None, None, seq_length, seq_length, device="cuda")
