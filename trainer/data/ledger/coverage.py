"""Which windows of each data set have been drawn, epoch by epoch: a mark for every window."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from trainer.data.batches import Draws
from trainer.data.ledger.report import EpochUse, numbered


class Use(IntEnum):
    """What a sample was drawn for."""

    LEARNED = 0
    LEFT_OUT = 1
    """By a step that was skipped or quarantined."""
    ELSEWHERE = 2
    """By the run from whose checkpoint this one goes on."""


@dataclass(frozen=True)
class Samples:
    """Samples in the order in which they were used; each array is [n]."""

    positions: np.ndarray
    steps: np.ndarray
    """The step that used each."""
    uses: np.ndarray
    """A `Use` for each."""


class Coverage:
    """Marks windows; holds one byte for every window of all data sets, however many epochs they are gone through."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """`sizes` are the numbers of windows in the data sets."""
        self._names, self._sizes = names, sizes
        self._seen = [np.zeros(size, np.bool_) for size in sizes]
        self._epochs = [0] * len(names)  # open, from 0
        self._counts = [np.zeros(len(Use), np.int64) for _ in names]
        self.finished: list[EpochUse] = []

    def add(self, samples: Samples, draws: Draws) -> Iterator[str]:
        """Mark what these samples drew; yields what may not be: a window that its epoch has drawn already.

        Samples that were used before may not come later.
        """
        for dataset in np.unique(draws.datasets).tolist():
            of_dataset = np.flatnonzero(draws.datasets == dataset)
            for epoch in np.unique(draws.epochs[of_dataset]).tolist():
                yield from self._open(dataset, epoch)
                chosen = of_dataset[draws.epochs[of_dataset] == epoch]
                if epoch < self._epochs[dataset]:
                    ended = f"{self._names[dataset]} of epoch {epoch + 1}, which had ended"
                    yield from _repeats(samples, draws, chosen, ended)
                    continue
                self._counts[dataset] += np.bincount(samples.uses[chosen], minlength=len(Use))
                again = self._mark(dataset, draws.windows[chosen])
                yield from _repeats(samples, draws, chosen[again], f"{self._names[dataset]} again in epoch {epoch + 1}")

    def under_way(self) -> list[EpochUse]:
        """The epoch that each data set is in; its last window may be drawn."""
        return [self._use(dataset) for dataset in range(len(self._names))]

    def _open(self, dataset: int, epoch: int) -> Iterator[str]:
        """Go on to an epoch, ending those before it; yields which windows they lack."""
        name, current = self._names[dataset], self._epochs[dataset]
        if epoch <= current:
            return
        missing = np.flatnonzero(~self._seen[dataset])
        if len(missing):
            yield f"epoch {current + 1} of {name} ended without {numbered('window', missing)}"
        if epoch > current + 1:
            yield f"epochs {current + 2} to {epoch} of {name} were left out"
        self.finished.append(self._use(dataset))
        self._seen[dataset][:] = False
        self._counts[dataset][:] = 0
        self._epochs[dataset] = epoch

    def _mark(self, dataset: int, windows: np.ndarray) -> np.ndarray:
        """Which of the windows [n] had been marked before, or come earlier among them."""
        seen = self._seen[dataset]
        again = seen[windows]
        _, first = np.unique(windows, return_index=True)
        if len(first) < len(windows):
            earlier = np.ones(len(windows), np.bool_)
            earlier[first] = False
            again |= earlier
        seen[windows] = True
        return again

    def _use(self, dataset: int) -> EpochUse:
        seen, counts = self._seen[dataset], self._counts[dataset].tolist()
        return EpochUse(
            dataset=self._names[dataset],
            epoch=self._epochs[dataset] + 1,
            num_windows=self._sizes[dataset],
            num_drawn=int(np.count_nonzero(seen)),
            num_learned=counts[Use.LEARNED],
            num_left_out=counts[Use.LEFT_OUT],
            num_elsewhere=counts[Use.ELSEWHERE],
        )


def _repeats(samples: Samples, draws: Draws, places: np.ndarray, of: str) -> Iterator[str]:
    """A finding for each step that has drawn what it may not, at these places among the samples."""
    for step in np.unique(samples.steps[places]).tolist():
        mine = places[samples.steps[places] == step]
        drawn, as_samples = numbered("window", draws.windows[mine]), numbered("sample", samples.positions[mine])
        yield f"step {step} draws {drawn} of {of}, as {as_samples}"
