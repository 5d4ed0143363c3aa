"""The stability policy by itself: what counts as a fault, and what follows from faults in a row."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import StabilityConfig
from trainer.stability import (
    Accept,
    Decision,
    RollBack,
    Skip,
    StabilityState,
    Stop,
    after_checkpoint,
    fault,
    judge,
    pass_over,
    robust_zscore,
    roll_back,
)

NAN, INF = math.nan, math.inf


def calm(num_steps: int = 64, **state: Any) -> StabilityState:
    """After steps with losses around 2 (standard deviation 0.1) and gradient norms around 1 (0.2)."""
    draw = np.random.default_rng(1)
    losses, norms = (tuple(draw.normal(mean, std, num_steps).tolist()) for mean, std in ((2.0, 0.1), (1.0, 0.2)))
    return StabilityState(losses, norms, **state)


def judged(config: StabilityConfig, state: StabilityState, *losses: float) -> tuple[list[Decision], StabilityState]:
    """The decisions on steps 101, 102, ... with these losses."""
    decisions: list[Decision] = []
    for step, loss in enumerate(losses, 101):
        decision, state = judge(config, state, step, loss, 1.0)
        decisions.append(decision)
    return decisions, state


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(("loss", "grad_norm"), [(NAN, 1.0), (INF, 1.0), (2.0, NAN), (2.0, INF), (NAN, NAN)])
@pytest.mark.parametrize("zscore", [0.0, 8.0])
def test_what_is_no_number_is_a_fault_from_the_first_step_on(loss: float, grad_norm: float, zscore: float) -> None:
    config = StabilityConfig(spike_zscore=zscore)
    assert fault(config, StabilityState(), loss, grad_norm) == "not finite"
    assert fault(config, calm(), loss, grad_norm) == "not finite"


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (2.0, 1.0, None),
        (2.5, 2.0, None),
        (2.0 + 12 * 0.1, 1.0, "loss spike"),
        (2.0, 1.0 + 12 * 0.2, "gradient norm spike"),
        (1e30, 1e30, "loss spike"),
        (0.0, 0.0, None),  # far below is no trouble
        (-1e9, 1.0, None),
    ],
)
def test_spikes(loss: float, grad_norm: float, reason: str | None) -> None:
    assert fault(StabilityConfig(), calm(), loss, grad_norm) == reason
    assert fault(StabilityConfig(spike_zscore=0.0), calm(), loss, grad_norm) is None


def test_a_spike_needs_half_a_window() -> None:
    assert fault(StabilityConfig(), calm(31), 100.0, 1.0) is None
    assert fault(StabilityConfig(), calm(32), 100.0, 1.0) == "loss spike"
    assert fault(StabilityConfig(window=10), calm(5), 100.0, 1.0) == "loss spike"


def test_zscore_by_hand() -> None:
    window = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, deviations 2 1 0 1 97: their median is 1
    assert robust_zscore(3.0 + 1.4826 * 5, window) == pytest.approx(5)
    assert robust_zscore(3.0, window) == 0
    assert robust_zscore(2.1, [2.0] * 9) == pytest.approx(5)  # steps that do not differ: 1 % of the median
    assert robust_zscore(0.0, [0.0] * 9) == 0 and robust_zscore(1e-9, [0.0] * 9) == INF


def test_normal_steps_are_no_spikes() -> None:
    """Of the size of z = 8 among normal steps; a falling loss, as in training, is none either."""
    draw, state, config = np.random.default_rng(0), StabilityState(), StabilityConfig()
    for step in range(3000):
        loss = 2 + 8 * 0.99**step + 0.05 * draw.normal()
        decision, state = judge(config, state, step, loss, math.exp(0.3 * draw.normal()))
        assert isinstance(decision, Accept)
    assert len(state.losses) == len(state.grad_norms) == 64


# ----------------------------------------------------------------------------------------------------------- decisions


def test_skipped_steps_do_not_enter_the_window() -> None:
    before = calm()
    decisions, state = judged(StabilityConfig(), before, 90.0, NAN)
    assert decisions == [Skip("loss spike"), Skip("not finite")]
    assert (state.losses, state.grad_norms) == (before.losses, before.grad_norms)
    assert state.streak == state.skipped == (101, 102)


def test_an_accepted_step_ends_the_streak() -> None:
    decisions, state = judged(StabilityConfig(), calm(), NAN, NAN, 2.0, NAN, NAN, 2.01)
    assert [type(decision) for decision in decisions] == [Skip, Skip, Accept, Skip, Skip, Accept]
    assert state.streak == () and state.skipped == (101, 102, 104, 105)
    assert (
        state.losses == (*calm().losses, 2.0, 2.01)[-64:] and state.grad_norms == (*calm().grad_norms, 1.0, 1.0)[-64:]
    )


@pytest.mark.parametrize("most", [1, 2, 5])
def test_so_many_skips_in_a_row_roll_back(most: int) -> None:
    decisions, _ = judged(StabilityConfig(max_skips_in_a_row=most), calm(), *[NAN] * most)
    suspects = tuple(range(101 - most, 101 + most))  # the streak, and as many accepted steps that led into it
    assert decisions == [Skip("not finite")] * (most - 1) + [RollBack("not finite", suspects)]


def test_there_is_no_step_before_the_first_to_suspect() -> None:
    state = StabilityState()
    for step in (2, 3, 4):
        decision, state = judge(StabilityConfig(), state, step, NAN, NAN)
    assert decision == RollBack("not finite", (1, 2, 3, 4))


def test_a_rollback_keeps_what_is_known_and_takes_the_rest_from_the_checkpoint() -> None:
    restored = calm(40, skipped=(50,), quarantined=(30,), streak=(60,))
    _, troubled = judged(StabilityConfig(), calm(quarantined=(30, 31), num_rollbacks=1), NAN, NAN, NAN)
    state = roll_back(restored, troubled)
    assert state == replace(restored, streak=(), quarantined=(30, 31, *range(98, 104)), num_rollbacks=2)
    assert pass_over(state, 101) == replace(state, skipped=(50, 101))


def test_rollbacks_without_progress_end_the_run() -> None:
    config, state = StabilityConfig(max_rollbacks=2), calm()
    for number, first in enumerate((101, 104), 1):
        for step in range(first, first + 3):
            decision, state = judge(config, state, step, 9.0, 1.0)
        assert decision == RollBack("loss spike", tuple(range(first - 3, first + 3)))
        state = after_checkpoint(roll_back(calm(), state), first - 50)  # a checkpoint on the way is no progress
        assert state.num_rollbacks == number
    for step in (107, 108, 109):
        decision, state = judge(config, state, step, 9.0, 1.0)
    assert isinstance(decision, Stop) and decision.reason == "loss spike"
    assert decision.verdict == (
        "training diverged: step 109 is the last of 3 skipped in a row (loss spike, loss 9, gradient norm 1), after 2 "
        "rollbacks without progress; lower optimizer.lr, lengthen optimizer.warmup_tokens, or look at the text of "
        "steps 107 to 109"
    )


def test_progress_is_a_checkpoint_beyond_all_quarantined_steps() -> None:
    state = calm(quarantined=(40, 101), num_rollbacks=2)
    assert after_checkpoint(state, 101) == state
    assert after_checkpoint(state, 102) == replace(state, num_rollbacks=0)


def test_without_rollbacks_the_first_streak_ends_the_run() -> None:
    decisions, _ = judged(StabilityConfig(max_rollbacks=0, max_skips_in_a_row=1), calm(), NAN)
    assert isinstance(decisions[0], Stop) and "after 0 rollbacks" in decisions[0].verdict


losses = st.one_of(st.floats(1.0, 3.0), st.floats(10.0, 100.0), st.just(NAN))


@given(first=st.lists(losses, max_size=60), second=st.lists(losses, max_size=60))
def test_a_state_that_was_stored_decides_as_one_that_was_not(first: list[float], second: list[float]) -> None:
    config = StabilityConfig(window=8)
    _, state = judged(config, StabilityState(), *first)
    stored = StabilityState.from_tree(orjson.loads(orjson.dumps(state.as_tree())))
    assert stored == state
    assert judged(config, stored, *second) == judged(config, state, *second)


def test_an_absent_state_is_the_initial_one() -> None:
    assert StabilityState.from_tree({}) == StabilityState()
