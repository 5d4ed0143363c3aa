"""Core attention for megatron-core layers.

Shapes: s sequence, b batch, n heads of this tensor-parallel rank, d head size.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CausalAttention(torch.nn.Module):
    """Causal scaled-dot-product attention: no mask tensor, no [s, s] score matrix.

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
        assert attention_type == "self"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
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
        """query, key, value [s, b, n, d] -> [s, b, n * d]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        dropout = self.dropout if self.training else 0.0
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        # Heads differ between tensor-parallel ranks, so dropout draws from the stream that differs too. To enter that
        # stream twice would lose its place when activations are recomputed.
        with get_cuda_rng_tracker().fork() if dropout > 0 and not self.stream_is_own else nullcontext():
            context = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, dropout_p=dropout, scale=self.softmax_scale
            )
        context = context.permute(2, 0, 1, 3)
        return context.reshape(*context.shape[:2], -1)
