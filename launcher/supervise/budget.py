"""How many failures a run may have: what it remembers of them, and whether to start again.

The measure of progress is the step from which lives go on: whoever goes on from a later step than ever before has lost
nothing by the failures so far, and they are forgiven. As there are finitely many steps, no run restarts for ever.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from trainer.config import SuperviseConfig

Kind = Literal["rank", "agent", "machine", "hang"]
"""What failed: a rank by itself, the agent or fork server of a machine, a machine, or ranks that had to be killed."""

_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+|\[[^]]*\]")
"""What differs between two occurrences of one error: addresses, ports, counts."""


@dataclass(frozen=True)
class Failure:
    """Why a life ended before its time."""

    kind: Kind
    error: str
    """One line, which names the rank or the machine, and where to read more."""
    machine: str
    """Ray's name of the machine to blame."""
    step: int
    """The last step that was done before."""
    is_final: bool = False
    """Whether only a person can mend it."""
    log: str | None = None
    """Path of what was written by what failed."""

    @property
    def signature(self) -> tuple[str, int]:
        """Equal for what is likely the same error at the same place."""
        return _VARYING.sub("#", self.error), self.step


@dataclass(frozen=True)
class Memory:
    """Of what has happened since the run last got further, and of machines for ever."""

    farthest: int = -1
    """The latest step from which a life has gone on."""
    num_failures: int = 0
    num_preemptions: int = 0
    num_grown: int = 0
    last: tuple[str, int] | None = None
    """Signature of the last failure."""
    num_same: int = 0
    """Times in a row that it was that one."""
    machines: Mapping[str, int] = field(default_factory=dict)
    """Ray's name of a machine -> failures that were blamed on it."""

    def after_start(self, step: int) -> "Memory":
        """A life has gone on from a step."""
        if step <= self.farthest:
            return self
        return Memory(farthest=step, last=self.last, num_same=self.num_same, machines=self.machines)

    def after_preemption(self) -> "Memory":
        """A life ended because a machine was lost or is to leave."""
        return replace(self, num_preemptions=self.num_preemptions + 1)

    def after_growth(self) -> "Memory":
        """A life ended so that the next has more machines."""
        return replace(self, num_grown=self.num_grown + 1)

    def after_failure(self, failure: Failure) -> "Memory":
        blamed = dict(self.machines)
        if failure.machine:  # else nobody knows whose fault it was
            blamed[failure.machine] = blamed.get(failure.machine, 0) + 1
        num_same = self.num_same + 1 if failure.signature == self.last else 1
        return replace(
            self, num_failures=self.num_failures + 1, last=failure.signature, num_same=num_same, machines=blamed
        )


def verdict(policy: SuperviseConfig, memory: Memory, failure: Failure) -> str | None:
    """Why not to start again after a failure that is in `memory` already; None to start again."""
    if failure.is_final or not policy.max_failures:
        return failure.error
    if memory.num_same >= policy.max_same_failures:
        return f"{failure.error}; the same after step {failure.step} {memory.num_same} times in a row"
    if memory.num_failures > policy.max_failures:
        return (
            f"{failure.error}; {memory.num_failures} failures in a row without a newer checkpoint, and "
            f"supervise.max_failures is {policy.max_failures}"
        )
    return None


def weariness(policy: SuperviseConfig, memory: Memory) -> str | None:
    """Why not to start again after a preemption; None to start again."""
    if memory.num_preemptions <= policy.max_preemptions:
        return None
    return (
        f"{memory.num_preemptions} machines were lost in a row without a newer checkpoint, and "
        f"supervise.max_preemptions is {policy.max_preemptions}"
    )


def delay_seconds(policy: SuperviseConfig, memory: Memory) -> float:
    """Before the next start."""
    num_doublings = memory.num_failures - 2
    if num_doublings < 0:
        return 0.0
    return min(policy.delay_seconds * 2.0 ** min(num_doublings, 60), policy.longest_delay_seconds)


def grow_seconds(policy: SuperviseConfig, memory: Memory) -> float:
    """For which machines that are back must stay before the run grows; doubled by each time it did without progress."""
    return policy.grow_seconds * 2.0 ** min(memory.num_grown, 20)
