"""Why one plan is better than others: what differs in their settings, and in the parts of memory and time."""

from dataclasses import asdict, dataclass
from typing import Any

from launcher.planning.layout_space import Layout
from launcher.planning.planner import Plan


@dataclass(frozen=True)
class Change:
    """A part that two plans differ in."""

    part: str
    best: float
    other: float

    @property
    def more(self) -> float:
        return self.other - self.best


@dataclass(frozen=True)
class Alternative:
    """Another plan beside the best one."""

    best: Plan
    other: Plan

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the other layout that differ, by their names."""
        best, other = (Layout.of(plan.config)._asdict() for plan in (self.best, self.other))
        return {name: value for name, value in other.items() if value != best[name]}

    @property
    def slower(self) -> float:
        """Part by which the other's step is longer."""
        return self.other.step.seconds / self.best.step.seconds - 1

    @property
    def missing_bytes(self) -> float:
        """0 where the other fits."""
        return max(0.0, -self.other.free_bytes)

    @property
    def seconds(self) -> list[Change]:
        """Parts of the step, the ones of which the other takes most more first."""
        return _changes(asdict(self.best.step), asdict(self.other.step))

    @property
    def bytes(self) -> list[Change]:
        """Parts of the memory of the fullest rank, likewise."""
        return _changes(asdict(self.best.memory), asdict(self.other.memory))

    def as_tree(self) -> dict[str, Any]:
        """For machines."""
        return {
            "settings": self.settings,
            "layout": self.other.config.parallel.describe(),
            "fits": self.other.fits,
            "missing_bytes": self.missing_bytes,
            "slower": self.slower,
            "more_seconds": {each.part: each.more for each in self.seconds},
            "more_bytes": {each.part: each.more for each in self.bytes},
        }


def _changes(best: dict[str, float], other: dict[str, float]) -> list[Change]:
    """Those that there are."""
    changes = (Change(part, best[part], other[part]) for part in best)
    return sorted((each for each in changes if each.more), key=lambda each: -each.more)
