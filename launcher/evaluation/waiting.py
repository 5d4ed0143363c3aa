"""Which checkpoints wait to be judged. Pure."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Waiting:
    """Checkpoints that were committed and not judged yet, by their steps, the first first."""

    when_behind: Literal["skip", "queue"]
    steps: tuple[int, ...] = ()

    def committed(self, step: int) -> tuple["Waiting", tuple[int, ...]]:
        """One more; and those that are left out now.

        A step that waits already is there once: the run went back, and what waited has been written over.
        """
        others = tuple(each for each in self.steps if each != step)
        if self.when_behind == "skip":
            return replace(self, steps=(step,)), others
        return replace(self, steps=(*others, step)), ()

    def void_after(self, step: int) -> tuple["Waiting", tuple[int, ...]]:
        """The run goes on from this step; and those that are left out because of it."""
        voided = tuple(each for each in self.steps if each > step)
        return replace(self, steps=tuple(each for each in self.steps if each <= step)), voided

    def next(self) -> tuple["Waiting", int | None]:
        """The one to judge now."""
        return replace(self, steps=self.steps[1:]), self.steps[0] if self.steps else None
