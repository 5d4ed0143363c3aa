"""Batch ramp and learning rate against GPT-3's recipe (Brown et al. 2020, appendix B) worked out by hand."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.schedule import Schedule, Step, learning_rate


def config_of(total_tokens: int = 1000, **optimizer: Any) -> RunConfig:
    return from_tree({"train": {"total_tokens": total_tokens}, "optimizer": {"lr": 2.0, **optimizer}})


def test_gpt3_recipe() -> None:
    config = from_tree({"preset": "gpt3_175b"})
    million, billion = 10**6, 10**9
    by_hand = {
        0: 0.0,
        375 * million // 2: 0.3e-4,
        375 * million: 0.6e-4,
        # halfway between warm-up and the end of the decay, the cosine is at its middle: the mean of peak and a tenth
        (375 * million + 260 * billion) // 2: 0.33e-4,
        # a third of the way its angle is 60 degrees: three quarters of the way up from a tenth
        375 * million + (260 * billion - 375 * million) // 3: (0.1 + 0.9 * 0.75) * 0.6e-4,
        260 * billion: 0.06e-4,
        300 * billion: 0.06e-4,
        10**13: 0.06e-4,
    }
    assert {tokens: learning_rate(config, tokens) for tokens in by_hand} == pytest.approx(by_hand, rel=1e-9)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    config = config_of(min_lr_fraction=0.0)
    assert learning_rate(config, 0) == 2.0
    assert learning_rate(config, 1) == pytest.approx(1 + math.cos(math.pi / 1000), rel=1e-12)
    assert learning_rate(config, 999) > 0.0
    assert learning_rate(config, 1000) == 0.0


def test_decay_ends_with_the_run_unless_told_otherwise() -> None:
    assert learning_rate(config_of(), 500) == pytest.approx(1.1)
    assert learning_rate(config_of(decay_tokens=500), 500) == pytest.approx(0.2)
    assert learning_rate(config_of(decay_tokens=2000), 1000) == pytest.approx(1.1)
    assert learning_rate(config_of(decay_tokens=0), 1) == pytest.approx(0.2)  # 0 tokens are not "empty"


def test_constant() -> None:
    config = config_of(min_lr_fraction=1.0)
    assert {learning_rate(config, tokens) for tokens in range(0, 1500, 7)} == {2.0}


@given(warmup=st.integers(0, 500), decay=st.integers(501, 1500), fraction=st.floats(0, 1), step=st.integers(1, 50))
def test_rises_then_falls_without_a_jump(warmup: int, decay: int, fraction: float, step: int) -> None:
    config = config_of(warmup_tokens=warmup, decay_tokens=decay, min_lr_fraction=fraction)
    rates = {tokens: learning_rate(config, tokens) for tokens in range(0, 1601, step)}
    steepest = 2.0 * max(1 / max(warmup, 1), math.pi / 2 / (decay - warmup)) * step * (1 + 1e-9)
    for (before, old), (after, new) in pairwise(rates.items()):
        assert 0 <= new <= 2.0
        assert abs(new - old) <= steepest
        if after <= warmup:
            assert new > old
        elif before >= warmup:
            assert new <= old + 1e-12
    assert all(rate == pytest.approx(2.0 * fraction) for tokens, rate in rates.items() if tokens >= decay)


# ---------------------------------------------------------------------------------------------------------- batch ramp


def ramped(full: int, start: int | None, ramp_tokens: int, total_tokens: int = 10**6, seq_length: int = 4) -> RunConfig:
    ramp = {} if start is None else {"ramp_start_batch_size": start, "ramp_tokens": ramp_tokens}
    train = {"global_batch_size": full, "total_tokens": total_tokens, **ramp}
    return from_tree({"model": {"seq_length": seq_length}, "train": train})


def steps_of(schedule: Schedule) -> list[Step]:
    return [schedule.step_after(done) for done in range(schedule.num_steps)]


def test_without_a_ramp_all_steps_are_alike() -> None:
    schedule = Schedule(ramped(6, None, 0, total_tokens=6 * 4 * 3 + 1))
    assert steps_of(schedule) == [Step(n + 1, 6 * n, 6, 24 * (n + 1)) for n in range(4)]
    assert Schedule(ramped(6, None, 0, total_tokens=6 * 4 * 3)).num_steps == 3
    assert Schedule(ramped(6, None, 0, total_tokens=1)).num_steps == 1


def test_a_ramp_by_hand() -> None:
    """From 2 to 10 sequences over 40 sequences: one more for every 5 consumed, rounded down to even numbers."""
    schedule = Schedule(ramped(10, 2, 40 * 4, total_tokens=61 * 4))
    sizes = {0: 2, 2: 2, 4: 2, 6: 2, 8: 2, 10: 4, 14: 4, 18: 4, 22: 6, 28: 6, 34: 8, 42: 10, 52: 10}
    assert {step.first_sample: step.batch_size for step in steps_of(schedule)} == sizes
    assert schedule.consumed_samples(schedule.num_steps) == 62 and schedule.consumed_tokens(2) == 16


def test_gpt3_ramp() -> None:
    """32k tokens to 3.15M over 8B: the paper leaves 4 to 12B."""
    config = from_tree({"preset": "gpt3_175b", "train": {"ramp_start_batch_size": 16, "ramp_tokens": "8B"}})
    schedule = Schedule(config)
    first, last = schedule.step_after(0), schedule.step_after(schedule.num_steps - 1)
    assert (first.batch_size * 2048, last.batch_size * 2048) == (32768, 1536 * 2048)
    assert 300e9 <= last.tokens_after < 300e9 + 1536 * 2048
    halfway = next(step for step in steps_of(schedule) if step.tokens_after >= 4e9)
    assert halfway.batch_size == pytest.approx((16 + 1536) / 2, abs=16)
    assert next(step.tokens_after for step in steps_of(schedule) if step.batch_size == 1536) == pytest.approx(
        8e9, rel=1e-3
    )


@given(
    full=st.integers(1, 40),
    start=st.integers(1, 40),
    ramp_tokens=st.integers(1, 3000),
    total_tokens=st.integers(1, 5000),
    seq_length=st.sampled_from([2, 4, 7]),
)
def test_every_step_has_the_size_that_the_line_says(
    full: int, start: int, ramp_tokens: int, total_tokens: int, seq_length: int
) -> None:
    start = min(start, full)
    schedule = Schedule(ramped(full, start, ramp_tokens, total_tokens, seq_length))
    tokens, number = 0, 0
    while tokens < total_tokens:  # the definition, step after step
        line = start + (full - start) * Fraction(tokens, ramp_tokens)
        size = full if tokens >= ramp_tokens else min(full, int(line // start) * start)
        step = schedule.step_after(number)
        number, first_sample, tokens = number + 1, tokens // seq_length, tokens + size * seq_length
        assert step == Step(number, first_sample, size, tokens)
    assert schedule.num_steps == number
    # beyond the end it goes on, so that a longer run's checkpoint can be told from another batch size's
    assert schedule.consumed_tokens(number) == tokens < schedule.consumed_tokens(number + 1)


LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"parallel": {"data": 4}},
    {"parallel": {"data": 2, "pipeline": 2, "virtual_pipeline": 2}},
)


def test_every_layout_has_the_same_steps() -> None:
    train = {"global_batch_size": 24, "ramp_start_batch_size": 8, "ramp_tokens": 3000, "total_tokens": 10_000}
    configs = [from_tree({"model": {"seq_length": 16}, "train": train} | layout) for layout in LAYOUTS]
    configs.append(from_tree({"model": {"seq_length": 16}, "train": train | {"micro_batch_size": 8}}))
    first, *others = (steps_of(Schedule(config)) for config in configs)
    assert {step.batch_size for step in first} == {8, 16, 24} and all(steps == first for steps in others)


@pytest.mark.parametrize(
    ("train", "parallel", "message"),
    [
        ({"ramp_start_batch_size": 6, "ramp_tokens": 9}, {"data": 4}, "6 is not divisible by micro_batch_size 1 x par"),
        ({"ramp_start_batch_size": 6, "ramp_tokens": 9}, {"data": 4}, "use 4 or 8"),
        (
            {"ramp_start_batch_size": 2, "ramp_tokens": 9, "micro_batch_size": 2},
            {"pipeline": 2, "virtual_pipeline": 2},
            r"2 x parallel.data 1 x pipeline 2 = 4: .*; use 4 for train.ramp_start",
        ),
        ({"ramp_start_batch_size": 32, "ramp_tokens": 9}, {}, "32 is above train.global_batch_size 24"),
        ({"ramp_start_batch_size": 8}, {}, "8 needs train.ramp_tokens above 0"),
        ({"ramp_tokens": 9}, {}, "ramp_tokens 9 needs train.ramp_start_batch_size, which is empty"),
    ],
)
def test_ramps_that_cannot_be_are_refused(train: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_tree({"train": {"global_batch_size": 24} | train, "parallel": parallel})


@pytest.mark.parametrize("total_tokens", [1, 5000, 40_000])
def test_batches_are_those_of_all_steps(total_tokens: int) -> None:
    """Also where the run ends before its ramp."""
    train = {"total_tokens": total_tokens, "global_batch_size": 6, "ramp_start_batch_size": 2, "ramp_tokens": 20_000}
    schedule = Schedule(from_tree({"model": {"seq_length": 512}, "train": train}))
    steps = [schedule.step_after(done).batch_size for done in range(schedule.num_steps)]
    assert [size for size, num in schedule.batches() for _ in range(num)] == steps
