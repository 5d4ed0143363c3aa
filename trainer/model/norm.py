"""Layer norms for megatron-core layers.

Shapes: s sequence (split over tensor-parallel ranks under sequence parallelism), b batch, h hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class Norm(torch.nn.LayerNorm):
    """torch's layer norm, its parameters marked as seeing only this rank's part of the sequence where they do.

    megatron-core's own wrapper refuses sequence parallelism; the mark tells `trainer.engine` to sum the gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class NormAfterResidual(torch.nn.Module):
    """GPT-1's order: norm(residual + dropout(x + bias)), in the place of megatron-core's bias-dropout-add."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = Norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """megatron-core calls this first, then the result with ((x, bias), residual [s, b, h], dropout)."""

        def add_then_norm(x_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_and_bias
            x = x if bias is None else x + bias
            return self.norm(residual + F.dropout(x, p=dropout, training=training))

        return add_then_norm
