"""What the ledger of a run says."""

from dataclasses import dataclass, field

import numpy as np

_NAMED = 8  # samples or windows that a finding lists before it only counts


@dataclass(frozen=True)
class EpochUse:
    """How one pass through a data set was used."""

    dataset: str
    epoch: int
    """1 is the first."""
    num_windows: int
    num_drawn: int
    """Different windows; `num_windows` once the epoch is finished."""
    num_learned: int
    """Samples that the weights have learned from."""
    num_left_out: int
    """Samples of steps that were skipped or quarantined."""
    num_elsewhere: int
    """Samples that the run used from whose checkpoint this one goes on."""

    @property
    def is_finished(self) -> bool:
        return self.num_drawn == self.num_windows


@dataclass
class Stretch:
    """Steps in a row that are alike: all of `batch_size`, and all learned from, or none for the same reason."""

    first_step: int
    last_step: int
    first_sample: int
    last_sample: int
    batch_size: int
    reason: str | None
    """Why the weights have not learned from them; None where they have."""


@dataclass
class Ledger:
    """Which samples each step of the surviving history used, and whether that was exactly once."""

    first_step: int
    """1, or the one after the checkpoint of another run."""
    last_step: int
    num_steps: int
    """In the whole run."""
    begins_from: str | None
    """The checkpoint of the other run, beside which the earlier part of the history lies."""
    num_computed: int
    """Steps computed over all lives, void ones included."""
    num_restarts: int
    num_rollbacks: int
    num_voided_by_restart: int
    num_voided_by_rollback: int
    stretches: list[Stretch] = field(default_factory=list)
    """The whole surviving history: sample `first_sample + (step - first_step) * batch_size` is the first of a step."""
    epochs: list[EpochUse] = field(default_factory=list)
    """Finished ones in the order in which they ended, then those under way."""
    num_steps_compared: int = 0
    """Steps whose tokens were read again, from the prepared data."""
    num_steps_without_digest: int = 0
    """Steps computed by a version that did not record what they were fed."""
    num_checkpoints_compared: int = 0
    num_checkpoints_gone: int = 0
    """Pruned, or not within reach from here."""
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    """What does not hold, a line each; none is the proof."""

    @property
    def left_out(self) -> list[Stretch]:
        return [stretch for stretch in self.stretches if stretch.reason is not None]


def numbered(noun: str, numbers: np.ndarray) -> str:
    """For messages: the first few of some numbers, and how many there are if those are not all."""
    named = ", ".join(map(str, numbers[:_NAMED].tolist()))
    if len(numbers) <= _NAMED:
        return f"{noun}{'s' * (len(numbers) > 1)} {named}"
    return f"{len(numbers):,} {noun}s ({named}, ...)"


def span(noun: str, first: int, end: int) -> str:
    """For messages: the numbers from `first` up to `end`, which is not one of them."""
    return f"{noun} {first}" if end == first + 1 else f"{noun}s {first} to {end - 1}"
