"""How long each rank works in a step, from two looks at what all ranks say of their time. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trainer.heartbeat import STEP_PHASES, Beat

_MOST_CELLS = 256
"""Ranks in a row are told together where there are more."""


@dataclass(frozen=True)
class RankTimes:
    """Own seconds in a step: those in which a rank did not wait for others."""

    seconds: Mapping[int, float]
    """By rank."""

    def fields(self) -> dict[str, Any]:
        """Of the event `ranks`."""
        own = [self.seconds[rank] for rank in sorted(self.seconds)]
        group = -(-len(own) // _MOST_CELLS)
        cells = [max(own[first : first + group]) for first in range(0, len(own), group)]
        return {
            "seconds": [round(each, 6) for each in cells],
            "group": group,
            "min": min(own),
            "mean": fmean(own),
            "max": max(own),
            "slowest": max(self.seconds, key=lambda rank: self.seconds[rank]),
        }


def between(earlier: Mapping[int, Beat], later: Mapping[int, Beat]) -> RankTimes | None:
    """Of all ranks, where they are the same processes and each has done a step in between."""
    if not later or earlier.keys() != later.keys():
        return None
    found = {rank: _own_seconds(earlier[rank], beat) for rank, beat in later.items()}
    times = {rank: seconds for rank, seconds in found.items() if seconds is not None}
    return RankTimes(times) if len(times) == len(later) else None


def _own_seconds(earlier: Beat, later: Beat) -> float | None:
    is_same = (earlier.pid, earlier.start_ticks) == (later.pid, later.start_ticks)
    num_steps = later.num_steps - earlier.num_steps
    if not is_same or num_steps < 1:
        return None
    own = (
        later.seconds[phase] - later.waited[phase] - earlier.seconds[phase] + earlier.waited[phase]
        for phase in STEP_PHASES
    )
    return max(0.0, sum(own)) / num_steps
