"""The best layouts of a run: all of a stated space, by what they hold and how long they take."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

from launcher.planning.cluster import Cluster
from launcher.planning.layout_space import Grid, Layout, layouts, on_devices
from launcher.planning.planner import Plan, make_plan
from launcher.planning.rank_memory import Passing, Standing, passing, standing, together
from launcher.planning.rank_memory import candidates as fullest_candidates
from launcher.planning.reasons import Alternative
from launcher.planning.shared import Shared
from launcher.planning.step_time import StepModel
from trainer.config import RunConfig

_MOST_DOUBLINGS = 8
_NEIGHBOURS = 64  # numbers of devices on either side of one that no layout fills


class Candidate(NamedTuple):
    """A layout and what it comes to; its order is that of preference."""

    step_seconds: float
    memory_bytes: float
    """Of the fullest rank."""
    layout: Layout


@dataclass(frozen=True)
class Own:
    """The config's own layout among those found."""

    plan: Plan
    rank: int | None
    """Among all layouts that fit, 1 for the fastest; empty where it does not fit."""


@dataclass(frozen=True)
class Shortage:
    """Where nothing fits: what comes nearest."""

    nearest: Plan
    enough_devices: int | None
    """The first doubling of the devices with which something fits; empty if none does."""


@dataclass(frozen=True)
class Search:
    config: RunConfig
    cluster: Cluster
    num_devices: int
    num_layouts: int
    num_fitting: int
    best: list[Plan]
    """The fastest of each grid (tensor x pipeline x context x data) that fit, the fastest first."""
    reasons: list[Alternative]
    """What is worse about others than the best."""
    without_ramp: Alternative | None
    """The fastest if the batch did not grow, with the ZeRO stage, offload and sequence parallelism of the best, where
    that is faster."""
    own: Own | None
    """Empty where the search was for another number of devices."""
    shortage: Shortage | None
    possible_devices: list[int]
    """Where no layout fills the devices: the nearest numbers that one does."""

    def as_tree(self) -> dict[str, Any]:
        """For machines."""
        own, shortage = self.own, self.shortage
        return {
            "name": self.config.name,
            "device": self.cluster.device,
            "num_devices": self.num_devices,
            "num_layouts": self.num_layouts,
            "num_fitting": self.num_fitting,
            "layouts": [{"settings": settings(self.config, plan), **plan.as_tree()} for plan in self.best],
            "reasons": [each.as_tree() for each in self.reasons],
            "without_ramp": None if self.without_ramp is None else self.without_ramp.as_tree(),
            "own": None if own is None else {"rank": own.rank, **own.plan.as_tree()},
            "shortage": None
            if shortage is None
            else {
                "nearest": {"settings": settings(self.config, shortage.nearest), **shortage.nearest.as_tree()},
                "missing_bytes": -shortage.nearest.free_bytes,
                "enough_devices": shortage.enough_devices,
            },
            "possible_devices": self.possible_devices,
        }


def settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What makes the config's run that of the plan, by dotted key: all that differs."""
    placed = {f"launch.{key}": getattr(plan.config.launch, key) for key in ("nodes", "ranks_per_node")}
    chosen = Layout.of(plan.config).settings() | placed
    return {key: value for key, value in chosen.items() if attrgetter(key)(config) != value}


def search(config: RunConfig, cluster: Cluster, num_devices: int | None = None, num_best: int = 10) -> Search:
    """Of the config's model and batch on so many devices, those of its own layout if not said."""
    num = num_devices or config.parallel.num_ranks
    placed = on_devices(config, cluster, num)
    every = dict(evaluated(placed, cluster, layouts(placed, cluster, num)))
    fitting = sorted(each for each in every.values() if each.memory_bytes <= cluster.memory_bytes)
    by_grid: dict[Grid, Candidate] = {}
    for each in fitting:
        by_grid.setdefault(each.layout.grid, each)
    best = [_planned(each.layout, placed, cluster) for each in list(by_grid.values())[:num_best]]
    found = Search(config, cluster, num, len(every), len(fitting), best, [], None, None, None, [])
    if num == config.parallel.num_ranks:
        found = replace(found, own=_own(config, cluster, fitting))
    if not every:
        return replace(found, possible_devices=_possible(config, cluster, num))
    if not fitting:
        return replace(found, shortage=_shortage(config, cluster, num, every))
    runner_up = [each.layout for each in list(by_grid.values())[1:2]]
    others = [*runner_up, *_instructive(fitting[0].layout, every)]
    plans = [_planned(each, placed, cluster) for each in dict.fromkeys(others)]
    reasons = [Alternative(best[0], plan) for plan in plans]
    return replace(found, reasons=reasons, without_ramp=_without_ramp(best[0], placed, cluster))


def evaluated(config: RunConfig, cluster: Cluster, some: Iterable[Layout]) -> Iterator[tuple[Layout, Candidate]]:
    """With the time of a step where they fit, endless where they do not."""
    shared = Shared()
    for layout in some:
        memory = _memory_bytes(layout, config, cluster, shared)
        seconds = float("inf")
        if memory <= cluster.memory_bytes:
            seconds = StepModel(layout.applied(config), cluster, shared=shared).step().seconds
        yield layout, Candidate(seconds, memory, layout)


def _memory_bytes(layout: Layout, config: RunConfig, cluster: Cluster, shared: Shared) -> float:
    """Of the fullest rank, from two parts that many layouts share."""
    stages = fullest_candidates(layout.pipeline)

    def stays() -> list[Standing]:
        applied = layout.applied(config)
        return [standing(applied, cluster, stage) for stage in stages]

    def passes() -> list[Passing]:
        applied = layout.applied(config)
        return [passing(applied, stage) for stage in stages]

    chunks = layout.virtual_pipeline if layout.zero == 2 else 1  # whose gradients in fp32 stay for each
    staying = shared.get(stays, "standing", layout.grid, layout.zero, layout.offload, chunks)
    passed = shared.get(passes, "passing", layout.without_zero)
    return max(together(*each).total for each in zip(staying, passed, strict=True))


def _planned(layout: Layout, config: RunConfig, cluster: Cluster) -> Plan:
    return make_plan(layout.applied(config), cluster)


def _own(config: RunConfig, cluster: Cluster, fitting: list[Candidate]) -> Own:
    plan = make_plan(config, cluster)
    layout, seconds = Layout.of(config), plan.step.seconds
    faster = sum(each.step_seconds < seconds and each.layout != layout for each in fitting)
    return Own(plan, 1 + faster if plan.fits else None)


def _without_ramp(best: Plan, config: RunConfig, cluster: Cluster) -> Alternative | None:
    if not config.train.ramp_tokens:
        return None
    train = config.train.model_copy(update={"ramp_start_batch_size": None, "ramp_tokens": 0})
    free, chosen = config.model_copy(update={"train": train}), Layout.of(best.config)
    every = layouts(free, cluster, best.num_devices)
    alike = (each for each in every if each.sharding == chosen.sharding)
    fastest = min((each for _, each in evaluated(free, cluster, alike)), default=None)
    if fastest is None or fastest.step_seconds >= best.step.seconds:
        return None
    return Alternative(best, _planned(fastest.layout, free, cluster))


def _instructive(best: Layout, every: Mapping[Layout, Candidate]) -> Iterator[Layout]:
    """The best of the next grids along each axis, and the best layout with one other setting at a time."""
    of_grids: dict[Grid, Candidate] = {}
    for each in every.values():
        grid = each.layout.grid
        of_grids[grid] = min(of_grids.get(grid, each), each)
    for axis in range(3):
        rest = [place for place in range(3) if place != axis]
        line = [grid for grid in of_grids if all(grid[place] == best.grid[place] for place in rest)]
        below = max((grid for grid in line if grid[axis] < best.grid[axis]), default=None, key=lambda grid: grid[axis])
        above = min((grid for grid in line if grid[axis] > best.grid[axis]), default=None, key=lambda grid: grid[axis])
        yield from (of_grids[grid].layout for grid in (below, above) if grid)
    for name in ("micro_batch_size", "virtual_pipeline", "recompute", "zero", "sequence", "offload"):
        now = getattr(best, name)
        values = {getattr(each, name) for each in every} - {now}
        others = sorted(other for value in values if (other := best._replace(**{name: value})) in every)
        yield from _nearest(others, name, now)


def _nearest(others: list[Layout], name: str, now: Any) -> Iterator[Layout]:
    """Of numbers the next below and above; of anything else all."""
    if name not in ("micro_batch_size", "virtual_pipeline", "zero"):
        yield from others
        return
    yield from [each for each in others if getattr(each, name) < now][-1:]
    yield from [each for each in others if getattr(each, name) > now][:1]


def _shortage(config: RunConfig, cluster: Cluster, num: int, every: Mapping[Layout, Candidate]) -> Shortage:
    nearest = min(every.values(), key=lambda each: each.memory_bytes)
    counts = [num * 2**doubling for doubling in range(1, _MOST_DOUBLINGS + 1)]
    enough = next((count for count in counts if _something_fits(config, cluster, count)), None)
    return Shortage(_planned(nearest.layout, on_devices(config, cluster, num), cluster), enough)


def _something_fits(config: RunConfig, cluster: Cluster, num: int) -> bool:
    placed, shared = on_devices(config, cluster, num), Shared()
    some = layouts(placed, cluster, num)
    return any(_memory_bytes(each, placed, cluster, shared) <= cluster.memory_bytes for each in some)


def _possible(config: RunConfig, cluster: Cluster, num: int) -> list[int]:
    def is_possible(count: int) -> bool:
        return any(True for _ in layouts(on_devices(config, cluster, count), cluster, count))

    below = next(filter(is_possible, range(num - 1, max(0, num - _NEIGHBOURS), -1)), None)
    above = next(filter(is_possible, range(num + 1, num + _NEIGHBOURS)), None)
    return [each for each in (below, above) if each]
