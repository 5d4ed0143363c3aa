"""The steps of a run that count, as columns: a million of them fit into memory, and are void again in no time."""

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from trainer.events import Event
from trainer.heartbeat import STEP_PHASES

FLOATS = ("time", "loss", "grad_norm", "lr", "seconds", *STEP_PHASES)
WHOLE = ("step", "tokens", "num_samples")
_NO_PHASES: dict[str, float] = dict.fromkeys(STEP_PHASES, 0.0)


class Steps:
    """Those whose updates are in the weights, by number."""

    def __init__(self) -> None:
        self.columns: dict[str, array[float] | array[int]] = {
            **{name: array("q") for name in WHOLE},
            **{name: array("d") for name in FLOATS},
        }

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> Sequence[float]:
        """A column."""
        return self.columns[name]

    @property
    def last(self) -> int:
        """Number of the last one; zero if there is none."""
        return int(self.columns["step"][-1]) if len(self) else 0

    def add(self, event: Event) -> None:
        """A `step` event that is sound."""
        row = _NO_PHASES | event | (event.get("phases") or {})
        for name, column in self.columns.items():
            column.append(row[name])

    def void_after(self, step: int) -> int:
        """Forget those after a step; returns how many."""
        place = bisect_right(self.columns["step"], step)
        num_void = len(self) - place
        if num_void:
            for column in self.columns.values():
                del column[place:]
        return num_void
