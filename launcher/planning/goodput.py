"""What failures and saving take of a run's time: the expected share that goes into steps whose result is kept.

Failures come at a constant rate (a Poisson process). Some take a rank alone, and the machine's memory still holds the
last snapshot; others take the machine. The time of an interval between checkpoints is exact in expectation, as Daly's
(2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 20), which it is where all
failures are of one kind. Machines under repair are those of a queue with as many servers as machines, whose states are
visited as their rates say, whatever the distribution of a repair (Erlang 1917).
"""

import math
from dataclasses import dataclass, replace

_RARE = 1e-9  # share of the time below which no further state is looked at
_HOPELESS = 30.0  # mean times between failures that a piece of work may take: it would be tried e^30 times


@dataclass(frozen=True, kw_only=True)
class Failures:
    """How machines fail."""

    node_seconds: float
    """Mean time between failures of one machine."""
    lost_share: float
    """Part of the failures that take the machine, with all that is in its memory."""
    repair_seconds: float
    """Mean time until a machine that was lost is back."""

    def per_second(self, num_nodes: int) -> float:
        return num_nodes / self.node_seconds


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What training does so as to lose little."""

    interval_seconds: float
    """Of work between checkpoints."""
    stall_seconds: float
    """For which a checkpoint holds training up, if the one before is written."""
    written_seconds: float = 0.0
    """From its stall until a checkpoint is where a lost machine does not matter; the next one waits for it."""
    num_snapshots: int = 1
    """Points in an interval to which a run can return from memory, its checkpoint among them."""
    snapshot_stall_seconds: float = 0.0
    replicated: bool = False
    """Whether another machine holds every snapshot too."""

    @property
    def held_up_seconds(self) -> float:
        """By a checkpoint."""
        return self.stall_seconds + max(0.0, self.written_seconds - self.interval_seconds)


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """From a failure until training goes on."""

    rank_seconds: float
    """All machines are there."""
    machine_seconds: float
    """Another machine has taken the lost one's place."""
    patience_seconds: float = 0.0
    """To wait for a machine where no spare is left, before going on with fewer."""
    growing_seconds: float = 0.0
    """Spent on taking a machine that is back in again."""


@dataclass(frozen=True)
class Size:
    """A layout on fewer machines or on all of them."""

    num_nodes: int
    speed: float
    """Of the full layout's."""


STANDSTILL = Size(0, 0.0)


@dataclass(frozen=True)
class Run:
    """A run as far as its failures go."""

    failures: Failures
    saving: Saving
    restarts: Restarts
    num_spares: int
    sizes: tuple[Size, ...]
    """With all machines, with one less, with two less and so on; `STANDSTILL` from where no layout fits."""

    @property
    def goodput(self) -> float:
        """Work over expected time, both of the full layout: 1 if nothing failed and nothing were saved.

        While k machines are under repair the run is as fast as the layout on the others, and whenever it starts anew
        without its full layout, it waits first. Spares that wait do not fail.
        """
        states, repair = self._states(), self.failures.repair_seconds
        efficiency = {size: self._efficiency(size) for size in {size for size, _ in states}}
        found, faster = 0.0, STANDSTILL
        for k, (size, probability) in enumerate(states):
            running = probability * (1 - self._waits(k, size))
            found += running * size.speed * efficiency[size]
            if size.speed > 0 and size != faster and k:  # a machine that is back is taken in
                found -= running * k / repair * self.restarts.growing_seconds * faster.speed * efficiency[faster]
            faster = size
        return max(0.0, found)

    def _states(self) -> list[tuple[Size, float]]:
        """The layout in use while so many machines are under repair, from none on, and the share of the time."""
        sizes, logs = [self._size(0)], [0.0]
        while logs[-1] > max(logs) + math.log(_RARE):
            k, size = len(sizes) - 1, sizes[-1]
            rate = self._losses_per_second(size) * (1 - self._waits(k, size))
            if rate == 0:
                break
            logs.append(logs[-1] + math.log(rate * self.failures.repair_seconds / (k + 1)))
            sizes.append(self._size(k + 1))
        weights = [math.exp(each - max(logs)) for each in logs]
        return [(size, weight / sum(weights)) for size, weight in zip(sizes, weights, strict=True)]

    def _waits(self, num_in_repair: int, size: Size) -> float:
        """Share of the time of such a state in which the run waits for machines, though it has a layout without them.

        It does when a machine is lost, as often as one comes back, k / D, and when ranks fail that run.
        """
        if num_in_repair <= self.num_spares or size.speed == 0:
            return 0.0
        coming_back = num_in_repair / self.failures.repair_seconds
        seconds = -math.expm1(-coming_back * self.restarts.patience_seconds) / coming_back
        dying = (1 - self.failures.lost_share) * self.failures.per_second(size.num_nodes)
        return min(1.0, seconds * (coming_back + dying) / (1 + seconds * dying))

    def _size(self, num_in_repair: int) -> Size:
        missing = max(0, num_in_repair - self.num_spares)
        return self.sizes[missing] if missing < len(self.sizes) else STANDSTILL

    def _losses_per_second(self, size: Size) -> float:
        return self.failures.lost_share * self.failures.per_second(size.num_nodes)

    def _efficiency(self, size: Size) -> float:
        """Work over time on so many machines, all of which are there."""
        if size.speed == 0:
            return 0.0
        saving = replace(self.saving, interval_seconds=self.saving.interval_seconds / size.speed)
        rate = self.failures.per_second(size.num_nodes)
        return saving.interval_seconds / interval_seconds(rate, self.failures.lost_share, saving, self.restarts)


def interval_seconds(failures_per_second: float, lost_share: float, saving: Saving, restarts: Restarts) -> float:
    """Expected time from a checkpoint to the next one, with all that fails in between.

    Without snapshots and with one kind of failure: e^(r R) (e^(r (w + C)) - 1) / r, at a rate r, for w seconds of work,
    C of saving and restarts of R (Daly 2006, eq. 20).
    """
    num, work = saving.num_snapshots, saving.interval_seconds / saving.num_snapshots
    restart = restarts.machine_seconds
    if not saving.replicated:
        # what was done while the last checkpoint was on its way is done again, as a longer restart
        restart += min(saving.written_seconds, saving.interval_seconds)
    pieces = (work + saving.snapshot_stall_seconds, work + saving.held_up_seconds, restart, restarts.rank_seconds)
    if failures_per_second * max(pieces) > _HOPELESS:
        return math.inf
    process = _Process(failures_per_second, lost_share, restarts.rank_seconds)
    first, last = (process.attempt(seconds) for seconds in pieces[:2])
    if saving.replicated:
        return (num - 1) * process.repeated(first, restart) + process.repeated(last, restart)
    return process.repeated(first.times(num - 1).then(last), restart)


@dataclass(frozen=True)
class _Attempt:
    """At a piece of work, until it is done or a machine is lost."""

    succeeds: float = 1.0
    """Probability."""
    seconds: float = 0.0
    """Expected, whatever its end."""

    def then(self, other: "_Attempt") -> "_Attempt":
        return _Attempt(self.succeeds * other.succeeds, self.seconds + self.succeeds * other.seconds)

    def times(self, num: int) -> "_Attempt":
        """One after the other."""
        if self.succeeds == 1:
            return _Attempt(1.0, num * self.seconds)
        all_of_them = self.succeeds**num
        return _Attempt(all_of_them, self.seconds * (1 - all_of_them) / (1 - self.succeeds))


@dataclass(frozen=True)
class _Process:
    """Failures at a rate, of which a share takes a machine, and the others `rank_seconds`."""

    per_second: float
    lost_share: float
    rank_seconds: float

    def attempt(self, seconds: float) -> _Attempt:
        """A rank that dies begins it anew, as often as it takes."""
        rank_share = 1 - self.lost_share
        restart_fails = rank_share * self._fails(self.rank_seconds)
        comes_back = math.exp(-self.per_second * self.rank_seconds) / (1 - restart_fails)
        coming_back = self._until_failure(self.rank_seconds) / (1 - restart_fails)
        rank_dies = rank_share * self._fails(seconds)
        ends = 1 - rank_dies * comes_back
        return _Attempt(
            math.exp(-self.per_second * seconds) / ends,
            (self._until_failure(seconds) + rank_dies * coming_back) / ends,
        )

    def repeated(self, attempt: _Attempt, restart_seconds: float) -> float:
        """Until it has succeeded; after each loss there is a restart, which itself begins anew when anything fails."""
        if attempt.succeeds == 0:
            return math.inf
        restart = self._until_failure(restart_seconds) * math.exp(self.per_second * restart_seconds)
        return (attempt.seconds + (1 - attempt.succeeds) * restart) / attempt.succeeds

    def _fails(self, seconds: float) -> float:
        """Whether anything does within that time."""
        return -math.expm1(-self.per_second * seconds)

    def _until_failure(self, seconds: float) -> float:
        """Expected time to the first failure, or to the end."""
        return self._fails(seconds) / self.per_second if self.per_second else seconds


def best_interval(run: Run, step_seconds: float, num_steps: int, snapshot_steps: int | None = None) -> int:
    """Steps between checkpoints for the most goodput, at most `num_steps`; whole numbers of snapshots if any is due.

    The time lost falls with the interval until its minimum, and rises from there on.
    """
    unit = snapshot_steps if snapshot_steps and snapshot_steps <= num_steps else 1

    def goodput(num: int) -> float:
        return at_interval(run, num * unit, step_seconds, snapshot_steps).goodput

    low, high = 1, max(1, num_steps // unit)
    while high - low > 2:
        third = (high - low) // 3
        one, other = low + third, high - third
        if goodput(one) >= goodput(other):
            high = other
        else:
            low = one
    return unit * max(range(low, high + 1), key=goodput)


def at_interval(run: Run, steps: int, step_seconds: float, snapshot_steps: int | None = None) -> Run:
    """The same run with other checkpoints, and snapshots as often as before."""
    num_snapshots = max(1, round(steps / snapshot_steps)) if snapshot_steps else 1
    return replace(run, saving=replace(run.saving, interval_seconds=steps * step_seconds, num_snapshots=num_snapshots))
