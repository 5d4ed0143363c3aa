"""The learning rate against GPT-3's recipe (Brown et al. 2020, appendix B) worked out by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.schedule import learning_rate


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
