"""Which ranks hold the others up though the run goes on, from two looks at what all ranks say of their time.

In synchronous training every rank takes as long for a step as the slowest, and in whatever phase the others wait for
it, their time goes there: what tells a slow rank is the time it does not spend waiting for others. Each rank counts
what it waits in `torch.distributed` on gloo, in whatever layout and phase (`Heartbeat.waited`), and what is left is
its own. It does not matter whether the rank computes slowly, is not given its processor, is stopped now and then or
waits for a disk: the phase tells loading from computing.

What cannot be seen:
- On NCCL the host does not wait, the GPU does: all of a step is every rank's own, and only time that a rank spends
  loading data, which others have not, shows. A slow GPU does not.
- Work that the layout spreads unevenly (a pipeline's first and last stage, a rank that writes events) looks like
  slowness; `factor` must leave room for it. In a pipeline, too, a stage waits for its neighbours' share of the bubble.
- A slow network counts as waiting, for all ranks, so none is found.
- A rank that is stopped while it waits counts that as waiting.
- Where half of the ranks or more are slow, slow is what is usual.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median_low

from trainer.heartbeat import STEP_PHASES, Beat, StepPhase

LEAST_STEPS = 5
"""Between two looks that may be compared: they fall into the middle of a step, which counts for one or the other."""


@dataclass(frozen=True)
class Straggler:
    rank: int
    phase: StepPhase
    """In which it takes longest, compared with the others."""
    ratio: float
    """How many times as long as they would a step takes, were this rank like the others."""


def find(earlier: Mapping[int, Beat], later: Mapping[int, Beat], factor: float) -> list[Straggler]:
    """The ranks because of which a step takes `factor` times as long as it would, the worst first.

    Args:
        earlier: the beats of ranks of the whole run at about the same time; a rank that is missing, or has begun
            anew meanwhile, is passed over.
        later: so many steps later that a step more or less does not matter.
    """
    shares = {
        rank: share
        for rank in earlier.keys() & later.keys()
        if (share := _own_shares(earlier[rank], later[rank])) is not None
    }
    if len(shares) < 2:
        return []
    usual = median_low(sum(share.values()) for share in shares.values())
    usual_in = {phase: median_low(share[phase] for share in shares.values()) for phase in STEP_PHASES}
    found = []
    for rank, share in shares.items():
        excess = min(sum(share.values()) - usual, 1 - 1e-9)
        phase = max(STEP_PHASES, key=lambda phase, share=share: share[phase] - usual_in[phase])  # type: ignore[misc]
        found.append(Straggler(rank, phase, 1 / (1 - excess)))
    return sorted((each for each in found if each.ratio >= factor), key=lambda each: (-each.ratio, each.rank))


def _own_shares(earlier: Beat, later: Beat) -> dict[StepPhase, float] | None:
    """Of the time that steps took, what the rank did not wait for others, by phase."""
    is_same = (earlier.pid, earlier.start_ticks) == (later.pid, later.start_ticks)
    if not is_same or later.num_steps - earlier.num_steps < LEAST_STEPS:
        return None
    spent = {phase: later.seconds[phase] - earlier.seconds[phase] for phase in STEP_PHASES}
    waited = {phase: later.waited[phase] - earlier.waited[phase] for phase in STEP_PHASES}
    total = sum(spent.values())
    return {phase: max(0.0, spent[phase] - waited[phase]) / total for phase in STEP_PHASES} if total > 0 else None


@dataclass(frozen=True)
class Streaks:
    """In how many looks in a row each rank was found."""

    lengths: Mapping[int, int] = field(default_factory=dict)

    def after(self, found: Iterable[Straggler]) -> "Streaks":
        """With one more look."""
        return Streaks({each.rank: self.lengths.get(each.rank, 0) + 1 for each in found})

    def reached(self, num_looks: int) -> list[int]:
        """The ranks that have now been found so many times in a row; each once, until it has recovered."""
        return sorted(rank for rank, length in self.lengths.items() if length == num_looks)
