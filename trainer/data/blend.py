"""Which data set the n-th sample of a run comes from: a function of n, by the weights of the blend.

Weights become whole numbers of samples in a period of 2^16, and a period is laid out once so that every prefix holds
the weights as evenly as whole samples can; the run repeats it. A position is one integer, at no cost to resume from,
and what is held in memory is one period, whatever the run and its data sets are.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from trainer.config import RunConfig, UserError
from trainer.data_config import check_blend
from trainer.schedule import Schedule

PERIOD = 1 << 16
"""Samples after which the layout repeats. A weight is kept to half of 1/PERIOD, 0.05 % of GPT-3's smallest."""


class Blend:
    """A fixed order of data sets; of the first n samples, each has less than 1 sample more or less than its share."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` are of any scale; the data sets of weight 0 are left out."""
        self.names = tuple(name for name, weight in weights.items() if weight)
        self.counts = quantize([weights[name] for name in self.names])
        """Samples of each data set in a period."""
        self._datasets, self._ranks = _layout(tuple(self.counts))
        self._counts = np.array(self.counts)

    @property
    def shares(self) -> list[float]:
        """The part of all samples that each data set has; they sum to 1."""
        return [count / PERIOD for count in self.counts]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample, the number of its data set in `names`, and how many of that set come before it."""
        periods, places = np.divmod(positions, PERIOD)
        datasets = self._datasets[places]
        return datasets, periods * self._counts[datasets] + self._ranks[places]

    def drawn(self, num_samples: int) -> dict[str, int]:
        """Samples from each data set among the first `num_samples`."""
        periods, rest = divmod(num_samples, PERIOD)
        begun = np.bincount(self._datasets[:rest], minlength=len(self.names)).tolist()
        return {name: periods * count + more for name, count, more in zip(self.names, self.counts, begun, strict=True)}

    def describe(self) -> str:
        """For messages and fingerprints: equal blends read the same, whatever the scale of their weights."""
        return (
            ", ".join(f"{name} {count}" for name, count in zip(self.names, self.counts, strict=True)) + f" of {PERIOD}"
        )


@dataclass(frozen=True)
class DatasetUse:
    """What a run takes from one data set."""

    name: str
    share: float
    """Of the run's samples."""
    tokens: int
    """Training tokens in the data set."""
    samples: int
    """Sequences drawn from it over the whole run."""
    epochs: float
    """How often each of its windows is read; GPT-3 (table 2.2) read its Wikipedia 3.4 times."""


def epochs(
    config: RunConfig, tokens: Mapping[str, int], own_blend: Mapping[str, float] | None = None
) -> list[DatasetUse]:
    """What the run takes from every data set, those left out included, in the order of `tokens`.

    Raises:
        UserError: see `blend_in_force`, of which these are the arguments.
    """
    blend = blend_in_force(config, tokens, own_blend)
    schedule = Schedule(config)
    drawn = blend.drawn(schedule.consumed_samples(schedule.num_steps))
    shares = dict(zip(blend.names, blend.shares, strict=True))

    def use(name: str, size: int) -> DatasetUse:
        samples = drawn.get(name, 0)
        windows = num_windows(size, config.model.seq_length)
        return DatasetUse(name, shares.get(name, 0.0), size, samples, samples / windows if samples else 0.0)

    return [use(name, size) for name, size in tokens.items()]


def num_windows(num_tokens: int, seq_length: int) -> int:
    """Sequences in a data set: window i is the tokens from i * seq_length on, and one more as the last label."""
    return max(0, (num_tokens - 1) // seq_length)


def blend_in_force(config: RunConfig, tokens: Mapping[str, int], own_blend: Mapping[str, float] | None) -> Blend:
    """The blend of the config; else, of a folder named by data.prepared, its own; else by size (windows).

    Args:
        tokens: training tokens of every data set in the folder.
        own_blend: what the folder's manifest states.

    Raises:
        UserError: the weights do not fit the data sets, or one that is to be drawn from fills no window.
    """
    seq_length = config.model.seq_length
    weights: Mapping[str, float] | None = config.data.blend
    if weights is None and config.data.prepared:
        weights = own_blend
    if weights is not None:
        check_blend(weights, tokens)
    for name, size in tokens.items():
        if (weights is None or weights[name]) and num_windows(size, seq_length) < 1:
            leave_out = f", or give {name} weight 0 in data.blend" if len(tokens) > 1 else ""
            raise UserError(
                f"data set {name} holds {size} training tokens, fewer than one sequence of model.seq_length "
                f"{seq_length} + 1; add text or shorten the sequence{leave_out}"
            )
    if weights is None:
        return Blend({name: num_windows(size, seq_length) for name, size in tokens.items()})
    return Blend({name: weights[name] for name in tokens})


def quantize(weights: Sequence[float]) -> list[int]:
    """Whole numbers of at least 1 that sum to PERIOD, in proportion to weights above 0, by largest remainders."""
    assert 0 < len(weights) <= PERIOD and min(weights) > 0
    exact = [Fraction(weight) for weight in weights]  # sums and remainders without rounding
    small: set[int] = set()  # those whose share is below one sample get one, and the others share what is left
    while True:
        total = sum(weight for number, weight in enumerate(exact) if number not in small)
        quotas = [weight * (PERIOD - len(small)) / total if total else Fraction(0) for weight in exact]
        if not (more := {n for n, quota in enumerate(quotas) if quota < 1} - small):
            break
        small |= more
    counts = [1 if number in small else int(quota) for number, quota in enumerate(quotas)]
    by_remainder = sorted(set(range(len(exact))) - small, key=lambda number: (counts[number] - quotas[number], number))
    for number in by_remainder[: PERIOD - sum(counts)]:
        counts[number] += 1
    return counts


@lru_cache(maxsize=4)
def _layout(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For every place of a period, the number of its data set, and how many of that set's samples come before it.

    The chairman assignment of Tijdeman (1980). With k data sets and d = 1 / (2k - 2), sample j (from 0) of a set with
    share w may lie at place (j + d) / w or later, counted from 1, and must not lie beyond place (j + 1 - d) / w + 1.
    Giving every place to the most urgent sample that may lie there meets all deadlines; then, after n places, no set
    is further than 1 - d samples from w n.
    """
    inverse = 2 * max(len(counts), 2) - 2  # 1 / d
    datasets = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    spacing = np.array(counts)[datasets] * inverse
    earliest = -(-(ranks * inverse + 1) * PERIOD // spacing)
    latest = ((ranks + 1) * inverse - 1) * PERIOD // spacing + 1
    coming = np.lexsort((datasets, earliest))[::-1].tolist()
    earliest_places, urgency = earliest.tolist(), (latest * len(counts) + datasets).tolist()
    waiting: list[tuple[int, int]] = []  # (urgency, sample)
    order = np.empty(PERIOD, dtype=np.int64)
    for place in range(1, PERIOD + 1):
        while coming and earliest_places[coming[-1]] <= place:
            sample = coming.pop()
            heapq.heappush(waiting, (urgency[sample], sample))
        order[place - 1] = heapq.heappop(waiting)[1]
    return datasets[order], ranks[order]
