"""When a checkpoint is due: after a number of steps, after a time, or at Daly's optimum for this run.

Saving often costs stalls, saving seldom costs the work since the last checkpoint whenever something fails. Young (1974,
"A first order approximation to the optimum checkpoint interval") found where the sum is smallest, Daly (2006, "A higher
order estimate of the optimum checkpoint interval for restart dumps") more exactly.

Clocks differ between ranks: one of them decides for all.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from trainer.config import CheckpointConfig
from trainer.events import Event

PUBLISHED_RANK_SECONDS_PER_FAILURE = 16384 * 54 * 86400 / 419
"""50,700 hours: 419 unexpected interruptions in 54 days on 16,384 GPUs (Grattafiori et al. 2024, "The Llama 3 herd of
models", section 3.3.4 and table 5). Taken for ranks, of which each has a GPU."""

FIRST_INTERVAL_SECONDS = 60.0
"""Until a save has been measured. Soon, because only the first save shows what one costs, and that it works at all."""

LONGEST_INTERVAL_SECONDS = 3600.0
"""Daly's model holds for failures that are independent and of a known rate. Where they are not, this bounds what is
lost, and at such an interval even a save of half a minute costs less than a hundredth of the time."""

LEAST_INTERVAL_IN_COSTS = 10.0
"""Saving must leave ten elevenths of the time to training: a run that fails so often that it pays to save more is not
helped by saving."""

_RECENT_SAVES = 5  # whose median is the cost: a disk may slow down, and one slow save must not decide


@dataclass(frozen=True)
class Moment:
    """A point of a run."""

    step: int
    """Steps done."""
    seconds: float
    """Of a clock that never goes back."""


@dataclass(frozen=True)
class FailureHistory:
    """What the events of a run say about saving and failing."""

    num_failures: int = 0
    trained_seconds: float = 0.0
    """Time under which the failures were seen; the time between two lives of the run is not in it."""
    stall_seconds: tuple[float, ...] = ()
    """For which each save so far held training up, the newest last."""


def is_due(config: CheckpointConfig, saved: Moment, now: Moment, auto_seconds: float = FIRST_INTERVAL_SECONDS) -> bool:
    """Whether to save at `now`. If both a number of steps and a time are set, whichever comes first.

    Args:
        saved: when training went on after the last save, or began.
        auto_seconds: time from `saved` to the next save under `every_seconds: auto`; see `optimal_seconds`.
    """
    every_steps, every_seconds = config.interval_steps, config.every_seconds
    if now.step <= saved.step:
        return False
    if every_steps and now.step // every_steps > saved.step // every_steps:
        return True
    if every_seconds is None:
        return False
    return now.seconds - saved.seconds >= (auto_seconds if every_seconds == "auto" else every_seconds)


def optimal_seconds(history: FailureHistory, num_ranks: int) -> float:
    """Time to train between two saves (s), by Daly's formula within bounds."""
    if not history.stall_seconds:
        return FIRST_INTERVAL_SECONDS
    cost = median(history.stall_seconds[-_RECENT_SAVES:])
    optimum = daly_seconds(cost, mean_seconds_between_failures(history, num_ranks))
    return max(LEAST_INTERVAL_IN_COSTS * cost, min(optimum, LONGEST_INTERVAL_SECONDS))


def mean_seconds_between_failures(history: FailureHistory, num_ranks: int) -> float:
    """The published rate, corrected by what this run has seen.

    Failures are a Poisson process whose rate has a gamma prior worth one failure in the published time: its shape is 1
    and its scale that time. After F failures in T seconds the posterior rate has the mean (1 + F) / (prior + T).
    """
    prior_seconds = PUBLISHED_RANK_SECONDS_PER_FAILURE / num_ranks
    return (prior_seconds + history.trained_seconds) / (1 + history.num_failures)


def daly_seconds(cost_seconds: float, mean_seconds: float) -> float:
    """Time to work between two saves for the least expected run time (Daly 2006, eq. 37).

    Within 0.2 % of the minimum of his model while a save takes less than a fifth of the time between failures.

    Args:
        cost_seconds: for which a save holds the work up.
        mean_seconds: between failures.
    """
    if cost_seconds >= 2 * mean_seconds:
        return mean_seconds
    ratio = cost_seconds / (2 * mean_seconds)
    young = math.sqrt(2 * cost_seconds * mean_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_seconds


# ------------------------------------------------------------------------------------------------------ from the events

_CLEAN_ENDS = {"preempted", "diverged"}


def read_history(events: Sequence[Event]) -> FailureHistory:
    """The history of a run by its events (`trainer.events`), for a life that is about to begin.

    A life begins with `training_started` and its training ends with the last event before the next one that tells of a
    step. It failed if it did a step, and no `preempted`, `diverged` or end of the stage `train` closed it: what was
    killed, and also what a person interrupted, costs the work since the last checkpoint. A life that did no step lost
    none, and tells of a mistake in the set-up rather than of a machine.
    """
    lives = _lives(events)
    failed = [life for life in lives if life.num_steps and not life.ended_cleanly]
    return FailureHistory(len(failed), sum(life.seconds for life in lives), tuple(_stalls(events)))


@dataclass
class _Life:
    began: float  # Unix seconds
    last_sign: float
    num_steps: int = 0
    ended_cleanly: bool = False

    @property
    def seconds(self) -> float:
        return max(0.0, self.last_sign - self.began)  # a clock that was set back must not undo what was seen


def _lives(events: Iterable[Event]) -> list[_Life]:
    lives: list[_Life] = []
    for event in events:
        kind, time = event["kind"], event["time"]
        if kind == "training_started":
            lives.append(_Life(time, time))
        elif not lives:
            continue
        elif kind in ("step", "step_skipped"):
            lives[-1].num_steps += 1
            lives[-1].last_sign = time
        elif kind in _CLEAN_ENDS or (kind == "stage_finished" and event["stage"] == "train"):
            lives[-1].ended_cleanly = True
    return lives


def _stalls(events: Iterable[Event]) -> Iterable[float]:
    """For how long each save held training up: for its snapshot, or, where none was taken, until it was written."""
    written_beside: set[int] = set()  # steps whose snapshot a service still writes, perhaps into the next life
    for event in events:
        if event["kind"] == "checkpoint_snapshot":
            written_beside.add(event["step"])
            yield event["seconds"]
        elif event["kind"] == "checkpoint_saved" and event["step"] in written_beside:
            written_beside.remove(event["step"])
        elif event["kind"] == "checkpoint_saved":
            yield event["seconds"]
