"""What to do about a step whose loss or gradients are no numbers, or far off: a pure policy with explicit state.

A faulty step is skipped: it consumes its samples and leaves weights and optimizer as they were. After several in a row
training goes back to the newest checkpoint, from which it passes those steps over. When that does not help either,
the run ends. Loss and gradient norm are the same on every rank, and so is what is decided here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from trainer.config import StabilityConfig, UserError

_MAD_TO_STD = 1.4826  # of a normal distribution, whose median absolute deviation is 0.6745 standard deviations
_SMALLEST_SCALE = 0.01  # of the median: steps that hardly differ must not make a spike of the next one


Reason = Literal["not finite", "loss spike", "gradient norm spike", "quarantined"]
"""Why a step was skipped, as events and summaries name it."""


class TrainingDiverged(UserError):
    """The policy has come to its end; the text is its verdict. A `UserError`: starting again would not help."""


@dataclass(frozen=True)
class StabilityState:
    """All that the policy remembers; part of every checkpoint. Steps are numbered from 1."""

    losses: tuple[float, ...] = ()
    """Of the last accepted steps, newest last."""
    grad_norms: tuple[float, ...] = ()
    streak: tuple[int, ...] = ()
    """Steps skipped in a row just now."""
    skipped: tuple[int, ...] = ()
    """All steps that the weights have not learned from."""
    quarantined: tuple[int, ...] = ()
    """Steps that are passed over without being computed."""
    num_rollbacks: int = 0
    """Since the last sound checkpoint beyond all quarantined steps."""

    def as_tree(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "StabilityState":
        fields: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in tree.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Accept:
    """The weights are updated."""


@dataclass(frozen=True)
class Skip:
    reason: Reason


@dataclass(frozen=True)
class RollBack:
    """Skip, and go on from the newest checkpoint."""

    reason: Reason
    quarantine: tuple[int, ...]
    """Steps to pass over on the way."""


@dataclass(frozen=True)
class Stop:
    """Skip, and end the run."""

    reason: Reason
    verdict: str


Decision = Accept | Skip | RollBack | Stop


def fault(config: StabilityConfig, state: StabilityState, loss: float, grad_norm: float) -> Reason | None:
    """Why a step with this loss and gradient norm must not update the weights; None where it may."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "not finite"
    if not config.spike_zscore or len(state.losses) < config.window / 2:
        return None
    if robust_zscore(loss, state.losses) > config.spike_zscore:
        return "loss spike"
    if robust_zscore(grad_norm, state.grad_norms) > config.spike_zscore:
        return "gradient norm spike"
    return None


def robust_zscore(value: float, window: Sequence[float]) -> float:
    """How far `value` lies above the median of `window`, in standard deviations estimated from the median's own."""
    middle = median(window)
    deviation = _MAD_TO_STD * median(abs(each - middle) for each in window)
    scale = max(deviation, _SMALLEST_SCALE * abs(middle))
    if scale == 0:  # a window of zeros
        return math.inf if value > 0 else 0.0
    return (value - middle) / scale


def judge(
    config: StabilityConfig, state: StabilityState, step: int, loss: float, grad_norm: float
) -> tuple[Decision, StabilityState]:
    """What to do about a computed step, and the state after it."""
    reason = fault(config, state, loss, grad_norm)
    if reason is None:
        losses, grad_norms = (*state.losses, loss), (*state.grad_norms, grad_norm)
        return Accept(), replace(
            state, losses=losses[-config.window :], grad_norms=grad_norms[-config.window :], streak=()
        )
    state = replace(state, streak=(*state.streak, step), skipped=(*state.skipped, step))
    if len(state.streak) < config.max_skips_in_a_row:
        return Skip(reason), state
    if state.num_rollbacks < config.max_rollbacks:
        return RollBack(reason, _suspects(state)), state
    return Stop(reason, _verdict(state, f"{reason}, loss {loss:.4g}, gradient norm {grad_norm:.4g}")), state


def pass_over(state: StabilityState, step: int) -> StabilityState:
    """The state after a quarantined step; it belongs to no streak."""
    return replace(state, skipped=(*state.skipped, step))


def _suspects(state: StabilityState) -> tuple[int, ...]:
    """The streak, and as many steps before it: they were accepted, and their updates may have led into it.

    Passing over the streak alone would lead to the same weights again (Chowdhery et al. 2022, PaLM, section 5.1, skip
    batches from before a spike too).
    """
    first, last = state.streak[0], state.streak[-1]
    return tuple(range(max(1, first - len(state.streak)), last + 1))


def roll_back(restored: StabilityState, troubled: StabilityState) -> StabilityState:
    """The state to go on with from a checkpoint that holds `restored`, with what is known by now."""
    return replace(
        restored,
        streak=(),
        quarantined=tuple(sorted({*restored.quarantined, *troubled.quarantined, *_suspects(troubled)})),
        num_rollbacks=troubled.num_rollbacks + 1,
    )


def after_checkpoint(state: StabilityState, step: int) -> StabilityState:
    """The state to save after the accepted step `step`: beyond all trouble, that is progress."""
    return replace(state, num_rollbacks=0) if step > max(state.quarantined, default=0) else state


def _verdict(state: StabilityState, symptom: str) -> str:
    return (
        f"training diverged: step {state.streak[-1]} is the last of {len(state.streak)} skipped in a row ({symptom}), "
        f"after {state.num_rollbacks} rollbacks without progress; lower optimizer.lr, lengthen "
        f"optimizer.warmup_tokens, or look at the text of steps {state.streak[0]} to {state.streak[-1]}"
    )
