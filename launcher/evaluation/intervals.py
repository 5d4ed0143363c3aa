"""How sure a measured value is: 95 % confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class Measure:
    """A mean over examples, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def measure(values: Sequence[float], *, is_share: bool, seed: int = 0) -> Measure | None:
    """Of each example's value; None of no example. `is_share`: each is 0 or 1."""
    if not values:
        return None
    return wilson(round(sum(values)), len(values)) if is_share else bootstrap(values, seed)


def wilson(successes: int, trials: int) -> Measure:
    """The score interval (Wilson 1927), which is right for few trials too, and for shares of 0 and 1."""
    share, spread = successes / trials, Z * Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt((share * (1 - share) + spread / 4) / trials) / (1 + spread)
    low = 0.0 if successes == 0 else centre - half  # exactly, which floating point would miss
    high = 1.0 if successes == trials else centre + half
    return Measure(share, low, high)


def bootstrap(values: Sequence[float], seed: int) -> Measure:
    """Percentiles of the means of samples drawn anew from the values (Efron and Tibshirani 1993, chapter 13)."""
    drawn, all_values = np.random.default_rng(seed), np.asarray(values, np.float64)
    means = [all_values[drawn.integers(len(all_values), size=len(all_values))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Measure(float(all_values.mean()), float(low), float(high))
