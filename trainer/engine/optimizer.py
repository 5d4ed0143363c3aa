"""AdamW, as the innermost of DeepSpeed's optimizers."""

from collections.abc import Callable
from typing import Any

import torch

from trainer.config import OptimizerConfig


class GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates.

    All of DeepSpeed's optimizers call it last, with the gradient norm known. A refused step goes their usual way, so
    that gradients are reduced and cleared as ever, and the weights are derived anew from unchanged master weights.
    """

    updated: bool | None
    """In this step; None until DeepSpeed calls, once for every group. It need not when the norm is not finite."""
    may_update: Callable[[], bool]

    def __init__(self, module: torch.nn.Module, config: OptimizerConfig) -> None:
        super().__init__(
            _parameter_groups(module, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def open(self, may_update: Callable[[], bool]) -> None:
        """Begin a step; `may_update` is asked once."""
        self.updated, self.may_update = None, may_update

    def step(self, closure: Any = None) -> Any:
        if self.updated is None:
            self.updated = self.may_update()
        return super().step(closure) if self.updated else None


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases and norms are not."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
