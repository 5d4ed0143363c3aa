"""The engine: trains and evaluates this rank's share of the model.

megatron-core's schedule calls forward and backward (`trainer.pipeline`); DeepSpeed ZeRO owns everything from there to
the update (`zero`), and the state it keeps is open as boxes of global tensors (`state`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from trainer import device as devices
from trainer import parallel
from trainer.config import RunConfig
from trainer.data.batches import MicroBatch
from trainer.engine.state import TrainingState
from trainer.engine.zero import Zero
from trainer.heartbeat import StepPhase
from trainer.model.gpt import build_chunks
from trainer.model.sharding import placements
from trainer.pipeline import StageView, WatchLosses, run_schedule, sum_over_replicas

Accept = Callable[[float, float], bool]
"""Whether a step with this loss and this gradient norm may update the weights. The same answer on every rank."""


@dataclass(frozen=True)
class StepStats:
    """What one step did."""

    loss: float
    """Mean nats per token over the global batch."""
    grad_norm: float
    """Global L2 norm before clipping; infinite where a gradient is not finite."""
    num_tokens: int
    updated: bool
    """Whether the weights were updated."""


class Engine:
    """Trains this rank's share of the model."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self._device = config, device
        chunks = [chunk.to(device) for chunk in build_chunks(config)]
        where = placements(chunks)
        self._zero = Zero(config, chunks, where)
        self.state = TrainingState(config, self._zero.optimizer, where)
        self.stages = [StageView(chunk, partial(self._zero.forward, index)) for index, chunk in enumerate(chunks)]

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        lr: float,
        step: int,
        accept: Accept = lambda loss, grad_norm: True,
        phase: Callable[[StepPhase], None] = lambda phase: None,
    ) -> StepStats:
        """One step over this replica's micro-batches; `step` (0-based) names the dropout streams.

        Unless loss and gradients are finite and `accept` agrees, the step leaves the training state as it was. `phase`
        is told what follows on forward and backward; the host has then waited for the device, so that each phase is
        charged with its own.
        """
        self._zero.module.train()
        if self.config.model.dropout > 0:
            parallel.seed_dropout(self.config.seed, step)
        self._zero.begin_step()
        total, count = run_schedule(self.stages, self.config.model, micro_batches, forward_only=False)
        loss_sum, num_tokens = sum_over_replicas(total, count)
        loss = loss_sum / num_tokens
        phase("reducing gradients")
        self._zero.finalize_gradients()

        def is_sound(grad_norm: float) -> bool:
            phase("updating")
            return math.isfinite(loss) and math.isfinite(grad_norm) and accept(loss, grad_norm)

        updated, grad_norm = self._zero.update(lr, is_sound)
        devices.wait(self._device)
        return StepStats(loss, grad_norm, num_tokens, updated)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], watch: WatchLosses | None = None) -> tuple[float, int]:
        """Sum of token losses (nats) and number of tokens over all replicas; the same on every rank."""
        self._zero.module.eval()
        model = self.config.model
        return sum_over_replicas(*run_schedule(self.stages, model, micro_batches, forward_only=True, watch=watch))
