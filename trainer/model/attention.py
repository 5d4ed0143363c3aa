"""Core attention for megatron-core layers: dense or banded, in one piece or context parallel.

Shapes: s sequence, b batch, n heads of this tensor-parallel rank, m key-value heads (m divides n), d head size.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from trainer import parallel
from trainer.model.banded_attention import attend_banded
from trainer.model.context_parallel import gather_sequence, scatter_sequence
from trainer.model.rotary import rotate


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
        rotary_base: float | None = None,
    ) -> None:
        """rotary_base: rotate queries and keys by their positions; None where positions come in otherwise."""
        super().__init__()
        assert attention_type == "self" and softmax_scale is None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.rotary_base = rotary_base
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
        if self.rotary_base is not None:
            query, key = rotate(query, self.rotary_base), rotate(key, self.rotary_base)
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
    if window is not None and window < query.shape[2]:
        return attend_banded(query, key, value, window, dropout)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1]
    )
