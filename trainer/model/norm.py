"""Norms for megatron-core layers.

Shapes: s sequence (split over tensor-parallel ranks under sequence parallelism), b batch, h hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm with the mark that sequence parallelism needs; megatron-core's own wrapper refuses it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMS norm, marked as `LayerNorm` is."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self, config)


def norm_class(config: TransformerConfig) -> type[torch.nn.Module]:
    return {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}[config.normalization]


def _mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    """Each rank's gradients come from its part of the sequence alone; the mark tells `engine.zero` to sum them."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class NormAfterResidual(torch.nn.Module):
    """GPT-1's order: norm(residual + dropout(x + bias)), in the place of megatron-core's bias-dropout-add."""

    def __init__(self, config: TransformerConfig, norm: type[torch.nn.Module]) -> None:
        super().__init__()
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """megatron-core calls this first, then the result with ((x, bias), residual [s, b, h], dropout)."""

        def add_then_norm(x_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = x_and_bias
            x = x if bias is None else x + bias
            return self.norm(residual + F.dropout(x, p=dropout, training=training))

        return add_then_norm
