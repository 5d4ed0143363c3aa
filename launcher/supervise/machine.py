"""The states of a job that is kept alive, and what to do next: one pure function of the state and what happens.

A job has slots, each for an agent on a machine of its own: as many as the run has machines, and spares. A life is one
set of ranks from its start to its end, on some of the slots. At most one life is under way at any time.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from launcher.job.news import Down, Up
from launcher.supervise import budget
from launcher.supervise.budget import Failure, Memory
from trainer.config import SuperviseConfig

Phase = Literal[
    "starting",  # agents are coming up for the first time
    "running",  # a life is under way
    "saving",  # the ranks were asked to save and end, and another life follows
    "restarting",  # between two lives
    "resizing",  # between two lives, waiting for machines
    "draining",  # the ranks were asked to save and end, and none follows
    "finished",
    "preempted",
    "failed",
]
LIVING: frozenset[Phase] = frozenset({"running", "saving", "draining"})
ENDED: frozenset[Phase] = frozenset({"finished", "preempted", "failed"})

_GATHERING_SECONDS = 30.0
"""For all agents to answer before the first life starts without some, on those of the others that are enough."""
_ARRIVAL_SECONDS = 300.0
"""For as many agents as the run has machines to answer the first time, where patience is shorter."""


@dataclass(frozen=True)
class Plan:
    """What does not change during a job."""

    policy: SuperviseConfig
    sizes: tuple[int, ...]
    """Numbers of machines that hold a layout, downwards from the full one; see `launcher.sizing`."""
    num_slots: int


# ------------------------------------------------------------------------------------------------------- what happens


@dataclass(frozen=True)
class Leaving:
    """A machine is to leave the cluster."""

    slot: int
    reason: str
    seconds: float | None = None
    """Until it does, where that is known."""


@dataclass(frozen=True)
class Started:
    """The life under way goes on from a step."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The life has come to the last step."""


@dataclass(frozen=True)
class Stopped:
    """The ranks have saved and ended as they were asked to."""

    reason: str
    """As they tell it."""


@dataclass(frozen=True)
class Failed:
    """The life was cut short."""

    failure: Failure


@dataclass(frozen=True)
class EndAsked:
    """Somebody wants the run to end, in order."""

    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = Up | Down | Leaving | Started | Finished | Stopped | Failed | EndAsked | Tick

# ------------------------------------------------------------------------------------------------------- what to do


@dataclass(frozen=True)
class StartLife:
    slots: tuple[int, ...]
    """In the order of the nodes' numbers."""
    why: str


@dataclass(frozen=True)
class AskRanks:
    """Have the ranks save and end."""

    reason: str
    seconds: float | None = None
    """To do so, where there is less than the grace period."""


@dataclass(frozen=True)
class End:
    """No life follows; the phase says which end it is."""

    reason: str


Command: TypeAlias = StartLife | AskRanks | End


@dataclass(frozen=True)
class State:
    phase: Phase = "starting"
    life: tuple[int, ...] = ()
    """Slots of the life that is under way, or of the last one."""
    up: frozenset[int] = frozenset()
    leaving: frozenset[int] = frozenset()
    machines: dict[int, str] = field(default_factory=dict)
    """Slot -> Ray's name of the machine on which its agent is, or last was."""
    excluded: frozenset[str] = frozenset()
    """Machines that have failed too often."""
    memory: Memory = field(default_factory=Memory)
    not_before: float = 0.0
    """When the next life may start."""
    short_since: float | None = None
    """Since when there have been too few machines for the full layout."""
    enough_since: float | None = None
    """Since when there have been machines for a larger layout than that of the life under way."""
    why: str = ""
    """Of the phase, one line for a person."""


def react(plan: Plan, state: State, event: Event, now: float) -> tuple[State, Command | None]:
    """The state after an event, and what to do.

    Args:
        now: seconds of a clock that never goes back.
    """
    if state.phase in ENDED:
        return state, None
    state = _noted(state, event)
    match event:
        case EndAsked():
            return _asked_to_end(state, event)
        case Leaving() if state.phase == "running" and event.slot in state.life:
            return replace(state, phase="saving", why=event.reason), AskRanks(event.reason, event.seconds)
        case Finished() if state.phase in LIVING:
            return _ended(state, "finished", "")
        case Stopped() if state.phase in LIVING:
            return _stopped(plan, state, event, now)
        case Failed() if state.phase in LIVING:
            return _failed(plan, state, event.failure, now)
    if state.phase == "running":
        return _grow(plan, state, now)
    if state.phase in LIVING:
        return state, None
    return _next_life(plan, state, now)


def _noted(state: State, event: Event) -> State:
    """Who is there, and how far the run has come."""
    match event:
        case Up(slot, machine):
            return replace(
                state,
                up=state.up | {slot},
                leaving=state.leaving - {slot} if state.machines.get(slot) != machine else state.leaving,
                machines={**state.machines, slot: machine},
            )
        case Down(slot):
            return replace(state, up=state.up - {slot})
        case Leaving(slot):
            return replace(state, leaving=state.leaving | {slot})
        case Started(step) if state.phase in LIVING:
            return replace(state, memory=state.memory.after_start(step))
    return state


def usable(state: State) -> frozenset[int]:
    """Slots on which a life may start."""
    sound = frozenset(slot for slot in state.up if state.machines.get(slot) not in state.excluded)
    return sound - state.leaving


def _largest(plan: Plan, num_machines: int) -> int | None:
    return next((size for size in plan.sizes if size <= num_machines), None)


def _asked_to_end(state: State, event: EndAsked) -> tuple[State, Command | None]:
    if state.phase == "draining":
        return state, None
    if state.phase in LIVING:
        return replace(state, phase="draining", why=event.reason), AskRanks(event.reason)
    return _ended(state, "preempted", event.reason)


def _ended(state: State, phase: Phase, reason: str) -> tuple[State, Command]:
    return replace(state, phase=phase, why=reason), End(reason)


def _stopped(plan: Plan, state: State, event: Stopped, now: float) -> tuple[State, Command | None]:
    if state.phase != "saving":  # they were asked for good, by us or by somebody who has not told us
        return _ended(state, "preempted", event.reason)
    was_to_grow = state.enough_since is not None and not state.leaving & frozenset(state.life)
    memory = state.memory.after_growth() if was_to_grow else state.memory.after_preemption()
    return _go_on(plan, replace(state, memory=memory, why=event.reason), now)


def _failed(plan: Plan, state: State, failure: Failure, now: float) -> tuple[State, Command | None]:
    if state.phase == "draining":
        return _ended(state, "preempted", f"{state.why}, then {failure.error}")
    if failure.kind == "machine":
        return _go_on(plan, replace(state, memory=state.memory.after_preemption(), why=failure.error), now)
    memory = state.memory.after_failure(failure)
    state = replace(state, memory=memory, why=failure.error)
    final = budget.verdict(plan.policy, memory, failure)
    if final is not None:
        return _ended(state, "failed", final)
    state = _excluding(plan, state, failure.machine)
    return _go_on(plan, replace(state, not_before=now + budget.delay_seconds(plan.policy, memory)), now)


def _excluding(plan: Plan, state: State, machine: str) -> State:
    """Without a machine that has failed too often, if the others hold a layout."""
    if state.memory.machines.get(machine, 0) < plan.policy.max_node_failures:
        return state
    without = replace(state, excluded=state.excluded | {machine})
    return without if _largest(plan, len(usable(without))) is not None else state


def _go_on(plan: Plan, state: State, now: float) -> tuple[State, Command | None]:
    """A life has ended, and another is to follow."""
    weary = budget.weariness(plan.policy, state.memory)
    if weary is not None:
        return _ended(state, "failed", f"{state.why}; {weary}" if state.why else weary)
    return _next_life(plan, replace(state, phase="restarting", short_since=None, enough_since=None), now)


def _next_life(plan: Plan, state: State, now: float) -> tuple[State, Command | None]:
    """Start it as soon as it may, with as many machines as there are after patience."""
    free, full, is_first = usable(state), plan.sizes[0], state.phase == "starting"
    since = now if state.short_since is None else state.short_since
    num_lost = sum(slot not in state.up for slot in range(plan.num_slots))
    if len(free) >= full:
        if is_first and num_lost and now - since < _GATHERING_SECONDS:  # who comes first is not who lies best
            return replace(state, short_since=since), None
        return _start(state, full, now) if now >= state.not_before else (state, None)
    state = replace(state, short_since=since, phase="starting" if is_first else "resizing")
    patience_seconds = max(plan.policy.patience_seconds, _ARRIVAL_SECONDS if is_first else 0.0)
    may_come = min(full, len(free) + num_lost) > (_largest(plan, len(free)) or 0)
    if (may_come and now - since < patience_seconds) or now < state.not_before:
        return state, None
    size = _largest(plan, len(free))
    if size is not None:
        return _start(state, size, now)
    reason = f"{len(free)} of {full} machines are left, and no layout of this run fits on so few"
    if state.leaving and state.why:
        return _ended(state, "preempted", f"{state.why}; {reason}")
    return _ended(state, "failed", f"{state.why}; {reason}" if state.why else reason)


def _start(state: State, size: int, now: float) -> tuple[State, Command]:
    """On the machines of the last life before others: in their memory lie its snapshots, in their places."""
    free = usable(state)
    kept = [slot if slot in free else None for slot in state.life[:size]]
    kept += [None] * (size - len(kept))
    others = iter(sorted(free - {slot for slot in kept if slot is not None}))
    slots = tuple(next(others) if slot is None else slot for slot in kept)
    why = state.why or "the first life"
    return replace(state, phase="running", life=slots, short_since=None, enough_since=None, why=""), StartLife(
        slots, why
    )


def _grow(plan: Plan, state: State, now: float) -> tuple[State, Command | None]:
    """Ask the ranks to save when machines for a larger layout have been there for long enough."""
    larger = (_largest(plan, len(usable(state))) or 0) > len(state.life)
    if not larger:
        return replace(state, enough_since=None), None
    since = now if state.enough_since is None else state.enough_since
    if now - since < budget.grow_seconds(plan.policy, state.memory):
        return replace(state, enough_since=since), None
    reason = f"there are machines for more than {len(state.life)} nodes again"
    return replace(state, phase="saving", enough_since=since, why=reason), AskRanks(reason)
