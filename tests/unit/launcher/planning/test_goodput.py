"""The expected share of productive time against a simulation of events, published formulas, and what must hold."""

import heapq
import math
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.planning.goodput import (
    STANDSTILL,
    Failures,
    Restarts,
    Run,
    Saving,
    Size,
    at_interval,
    best_interval,
    interval_seconds,
)
from trainer.checkpoint.interval import daly_seconds

HOUR = 3600.0


def run_of(
    *,
    num_nodes: int = 100,
    node_hours: float = 6000.0,
    lost_share: float = 0.5,
    repair_hours: float = 24.0,
    spares: int = 0,
    smaller: tuple[Size, ...] = (),
    interval: float = 1800.0,
    stall: float = 5.0,
    written: float = 0.0,
    num_snapshots: int = 1,
    replicated: bool = False,
    rank_restart: float = 60.0,
    machine_restart: float = 120.0,
    patience: float = 300.0,
) -> Run:
    return Run(
        Failures(node_seconds=node_hours * HOUR, lost_share=lost_share, repair_seconds=repair_hours * HOUR),
        Saving(
            interval_seconds=interval,
            stall_seconds=stall,
            written_seconds=written,
            num_snapshots=num_snapshots,
            snapshot_stall_seconds=1.0 if num_snapshots > 1 else 0.0,
            replicated=replicated,
        ),
        Restarts(
            rank_seconds=rank_restart,
            machine_seconds=machine_restart,
            patience_seconds=patience,
            growing_seconds=rank_restart + stall,
        ),
        spares,
        (Size(num_nodes, 1.0), *smaller, STANDSTILL),
    )


# --------------------------------------------------------------------------------------------------------- simulation


@dataclass
class Simulation:
    """A run that lives through its events one by one: failures, machines that are back, saves."""

    run: Run
    random: random.Random
    now: float = 0.0
    kept: float = 0.0
    """Work that a lost machine does not take, if its checkpoint is written."""
    in_memory: float = 0.0
    """Work since then to which ranks that fail alone return."""
    beyond: float = 0.0
    """Work since the last snapshot."""
    on_its_way: float = 0.0
    """Work of the last checkpoint, until it is written."""
    repaired: list[float] = field(default_factory=list)
    """When each machine under repair is back."""

    def goodput(self, num_failures: int) -> float:
        run, num_failed, restart, size = self.run, 0, 0.0, self.run.sizes[0]
        while num_failed < num_failures:
            began = self.now
            fails_at = began + self.random.expovariate(size.num_nodes / run.failures.node_seconds)
            grows_at = self._grows_at(size)
            self.now = min(fails_at, grows_at)
            if began + restart < self.now:
                self._work(size, self.now - began - restart)
            self._come_back()
            if grows_at < fails_at:  # it saves before it ends
                self.kept, self.in_memory = self.kept + self.in_memory + self.beyond, 0.0
                restart, size = run.restarts.growing_seconds, self._layout()
                continue
            num_failed += 1
            is_loading = restart == run.restarts.machine_seconds and self.now < began + restart
            if self.random.random() < run.failures.lost_share:
                self._lose()
                restart = run.restarts.machine_seconds
            elif not is_loading:  # else what it was to load is on storage alone
                restart = run.restarts.rank_seconds
            size = self._wait()
        return (self.kept + self.in_memory) / self.now

    def _layout(self) -> Size:
        return self._size(len(self.repaired))

    def _size(self, num_away: int) -> Size:
        missing = max(0, num_away - self.run.num_spares)
        return self.run.sizes[missing] if missing < len(self.run.sizes) else STANDSTILL

    def _come_back(self) -> None:
        while self.repaired and self.repaired[0] <= self.now:
            heapq.heappop(self.repaired)

    def _grows_at(self, size: Size) -> float:
        """When so many machines are back that a larger layout fits."""
        if size == self.run.sizes[0]:
            return math.inf
        backs = sorted(self.repaired)
        return next(at for num, at in enumerate(backs, 1) if self._size(len(backs) - num).speed > size.speed)

    def _wait(self) -> Size:
        """Until all machines are there, or for as long as there is patience and a smaller layout."""
        self.beyond = 0.0
        until = self.now + self.run.restarts.patience_seconds
        while len(self.repaired) > self.run.num_spares:
            if self.repaired[0] > until and self._layout() is not STANDSTILL:
                self.now = max(self.now, until)
                break
            self.now = self.repaired[0]
            self._come_back()
        return self._layout()

    def _lose(self) -> None:
        heapq.heappush(self.repaired, self.now + self.random.expovariate(1 / self.run.failures.repair_seconds))
        if not self.run.saving.replicated:
            self.in_memory = 0.0
            self.kept -= self.on_its_way
        self.on_its_way = 0.0

    def _work(self, size: Size, seconds: float) -> None:
        """For so long, from the last snapshot on, saving on the way."""
        saving = self.run.saving
        piece = saving.interval_seconds / saving.num_snapshots
        while True:
            is_last = self.in_memory + 1.5 * piece > saving.interval_seconds
            needed = piece / size.speed + (saving.held_up_seconds if is_last else saving.snapshot_stall_seconds)
            if seconds < needed:
                break
            seconds -= needed
            self.in_memory += piece
            if is_last:
                self.kept += self.in_memory
                self.in_memory, self.on_its_way = 0.0, saving.interval_seconds
                whole = saving.interval_seconds / size.speed + saving.held_up_seconds
                whole += (saving.num_snapshots - 1) * saving.snapshot_stall_seconds
                self.kept += seconds // whole * saving.interval_seconds
                seconds %= whole
            if self.on_its_way and self.in_memory / size.speed + seconds >= saving.written_seconds:
                self.on_its_way = 0.0
        self.beyond = min(piece, seconds * size.speed)


HALF = tuple(Size(50, 0.5) for _ in range(50))
REPLICAS = tuple(Size(100 - k, (100 - k) / 100) for k in range(1, 90))
SETTINGS = {
    "rare failures": run_of(node_hours=60000, spares=3),
    "frequent failures": run_of(node_hours=300, lost_share=0.1, repair_hours=1, spares=30),
    "hardly getting on": run_of(node_hours=60, lost_share=0.2, repair_hours=1, spares=30),
    "slow restarts": run_of(
        node_hours=200, interval=900.0, rank_restart=1200.0, machine_restart=1800.0, repair_hours=1, spares=40
    ),
    "ranks alone": run_of(lost_share=0.0, node_hours=500),
    "machines alone": run_of(lost_share=1.0, node_hours=500, repair_hours=2, spares=9),
    "snapshots": run_of(node_hours=300, num_snapshots=10, interval=HOUR, spares=30, repair_hours=1),
    "replicated snapshots": run_of(
        node_hours=300, num_snapshots=10, interval=HOUR, spares=30, repair_hours=1, replicated=True
    ),
    "slow storage": run_of(node_hours=1500, written=600.0, spares=30, repair_hours=1),
    "no spares and no other layout": run_of(node_hours=3000, repair_hours=12),
    "a spare and no other layout": run_of(node_hours=1000, repair_hours=12, spares=1),
    "half the machines where one is missing": run_of(node_hours=6000, smaller=HALF),
    "half the machines, much patience and ranks that fail": run_of(
        node_hours=100, lost_share=0.2, smaller=HALF, patience=HOUR / 3, repair_hours=3, interval=600.0
    ),
    "a replica less for every machine": run_of(node_hours=1500, smaller=REPLICAS, spares=1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_closed_form_is_what_a_simulation_finds(name: str) -> None:
    """And so is what failures and saves take, which next to 1 is small where failures are rare."""
    run = SETTINGS[name]
    found = Simulation(run, random.Random(1)).goodput(25_000)
    assert run.goodput == pytest.approx(found, rel=0.01)
    noise = 0.05 if len(run.sizes) > 2 or run.num_spares < 2 else 0.02  # waits for repairs are few and long
    assert 1 - run.goodput == pytest.approx(1 - found, rel=noise)


# ------------------------------------------------------------------------------------------------- published formulas


def test_failures_of_one_kind_are_dalys() -> None:
    """Daly 2006, eq. 20: M e^(R / M) (e^((w + C) / M) - 1)."""
    mean, work, cost, restart = 6 * HOUR, 3420.0, 300.0, 600.0
    saving = Saving(interval_seconds=work, stall_seconds=cost)
    restarts = Restarts(rank_seconds=restart, machine_seconds=restart)
    expected = mean * math.exp(restart / mean) * math.expm1((work + cost) / mean)
    for lost_share in (0.0, 1.0):
        assert interval_seconds(1 / mean, lost_share, saving, restarts) == pytest.approx(expected)


@pytest.mark.parametrize("mean_hours", [0.25, 6.0, 24.0])
def test_the_best_interval_is_dalys(mean_hours: float) -> None:
    """The settings of his figures 3 to 5: 5 minutes for a save, 10 for a restart."""
    failures = Failures(node_seconds=mean_hours * HOUR, lost_share=0.0, repair_seconds=1.0)
    saving, restarts = (
        Saving(interval_seconds=1.0, stall_seconds=300.0),
        Restarts(rank_seconds=600, machine_seconds=600),
    )
    run = Run(failures, saving, restarts, 0, (Size(1, 1.0), STANDSTILL))
    best = best_interval(run, 1.0, 100_000)
    assert best == pytest.approx(daly_seconds(300.0, mean_hours * HOUR), rel=0.05)
    assert at_interval(run, round(daly_seconds(300.0, mean_hours * HOUR)), 1.0).goodput == pytest.approx(
        at_interval(run, best, 1.0).goodput, rel=0.002
    )


def test_waiting_machines_are_erlangs() -> None:
    """Without patience for fewer: the run stands still for the share of the time in which too many are under repair."""
    run = run_of(
        node_hours=1000, repair_hours=10, lost_share=1.0, spares=1, interval=60.0, stall=0.0, machine_restart=0
    )
    load = 100 * 10 / 1000
    weights = [1.0, load, load**2 / 2]
    efficiency = 60.0 / interval_seconds(100 / (1000 * HOUR), 1.0, run.saving, run.restarts)
    assert run.goodput == pytest.approx(efficiency * (weights[0] + weights[1]) / sum(weights))


def test_without_failures_only_saving_takes_time() -> None:
    run = run_of(node_hours=1e12, interval=100.0, stall=25.0)
    assert run.goodput == pytest.approx(0.8)


def test_a_run_that_never_gets_to_its_next_checkpoint_has_no_goodput() -> None:
    assert run_of(node_hours=1.0, interval=HOUR).goodput == 0
    assert run_of(node_hours=1e-9).goodput == 0


# ----------------------------------------------------------------------------------------------------- what must hold

RUNS = st.builds(
    run_of,
    num_nodes=st.just(100),
    node_hours=st.floats(500, 50_000),
    lost_share=st.floats(0, 1),
    spares=st.integers(0, 4),
    smaller=st.sampled_from([(), HALF, REPLICAS]),
    interval=st.floats(60, 10_000),
    stall=st.floats(0, 60),
    written=st.floats(0, 600),
    num_snapshots=st.sampled_from([1, 5]),
    replicated=st.booleans(),
    patience=st.floats(0, 600),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(run=RUNS)
def test_more_machines_hurt_and_more_reliable_ones_and_spares_help(run: Run) -> None:
    assert 0 <= run.goodput <= 1
    more = replace(run, sizes=tuple(Size(2 * size.num_nodes, size.speed) for size in run.sizes))
    reliable = replace(run, failures=replace(run.failures, node_seconds=2 * run.failures.node_seconds))
    spared = replace(run, num_spares=run.num_spares + 1)
    sooner = replace(run, failures=replace(run.failures, repair_seconds=run.failures.repair_seconds / 2))
    rounding = 1e-9
    assert more.goodput <= run.goodput + rounding
    assert reliable.goodput >= run.goodput - rounding
    assert spared.goodput >= run.goodput - rounding
    assert sooner.goodput >= run.goodput - rounding


@settings(max_examples=40, deadline=None, derandomize=True)
@given(run=RUNS, step_seconds=st.floats(0.5, 60))
def test_the_best_interval_beats_its_neighbours(run: Run, step_seconds: float) -> None:
    run = replace(run, saving=replace(run.saving, num_snapshots=1))
    best = best_interval(run, step_seconds, 100_000)
    found = at_interval(run, best, step_seconds).goodput
    for steps in {max(1, best - 1), best + 1, max(1, best // 2), 2 * best}:
        assert steps > 100_000 or at_interval(run, steps, step_seconds).goodput <= found + 1e-12


def test_a_run_may_wait_for_ever() -> None:
    for lost_share in (0.0, 0.3, 0.78, 1.0):
        waits, hurries = (
            run_of(smaller=REPLICAS, lost_share=lost_share, patience=patience).goodput for patience in (1e300, 300.0)
        )
        assert 0 < waits <= hurries


def test_a_run_that_ends_before_its_first_snapshot_may_save_earlier() -> None:
    run = run_of(interval=10.0)
    assert best_interval(run, 1.0, 90, snapshot_steps=100) == best_interval(run, 1.0, 90)


def test_snapshots_and_their_replicas_help() -> None:
    seldom = {"node_hours": 1000.0, "interval": 4 * HOUR, "spares": 20}
    plain, snapshots, replicas = (
        run_of(**seldom, num_snapshots=num, replicated=replicated).goodput  # type: ignore[arg-type]
        for num, replicated in ((1, False), (20, False), (20, True))
    )
    assert plain < snapshots < replicas
