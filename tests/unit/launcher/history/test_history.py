"""The history of a run is what its events say in all, whatever the order in which they were read."""

import random
from dataclasses import asdict
from itertools import count, pairwise

import pytest

from launcher.history import foresight
from launcher.history.history import RunHistory
from launcher.history.values import Facts, state_of
from launcher.history.view import view_of
from trainer.config_file import from_tree
from trainer.events import Event, surviving_steps

CLOCK = count(1000)


def event(kind: str, **fields: object) -> Event:
    return {"time": float(next(CLOCK)), "kind": kind, **fields}


def step(number: int, loss: float = 2.0) -> Event:
    facts = {"tokens": 32 * number, "num_samples": 4, "first_sample": 4 * number - 4, "lr": 0.1, "grad_norm": 1.0}
    phases = {"loading data": 0.125, "computing": 0.25}
    return event("step", step=number, loss=loss, seconds=0.5, phases=phases, **facts)


def skipped(number: int, reason: str = "loss spike") -> Event:
    return event("step_skipped", step=number, num_samples=4, first_sample=0, reason=reason, loss=None, grad_norm=None)


def began(at: int, number: int = 1, nodes: int = 1) -> list[Event]:
    return [
        event("life_started", number=number, nodes=nodes, data=1, why="anything"),
        event("training_started", step=at, checkpoint=None, tier="disk", threads_per_rank=1, ranks=4, device="CPU"),
    ]


def failed(what: str) -> Event:
    return event("life_failed", what=what, error="rank 1 was killed", machine="", step=0)


def test_the_steps_that_count_are_those_of_the_record() -> None:
    """Against `surviving_steps`, which knows the record as a whole, on runs that are led astray in every way."""
    draw = random.Random(3)
    for _ in range(100):
        events, at = began(0), 0
        for _ in range(60):
            match draw.randrange(8):
                case 0:
                    at = draw.randrange(at + 1)
                    events += began(at, number=2)
                case 1:
                    to = draw.randrange(at + 1)
                    events.append(event("rolled_back", from_step=at, to_step=to, reason="loss spike"))
                    at = to
                case 2:
                    events.append(skipped(at := at + 1))
                case _:
                    events.append(step(at := at + 1, loss=draw.random()))
        history = RunHistory.of(events)
        count_too = surviving_steps(events)
        assert list(history.steps["step"]) == [each["step"] for each in count_too]
        assert list(history.steps["loss"]) == [each["loss"] for each in count_too]
        assert list(history.skipped.values()) == surviving_steps(events, "step_skipped")
        assert history.step == at and not history.num_unreadable


def test_work_that_was_done_is_counted_though_it_is_void() -> None:
    history = RunHistory.of([*began(0), step(1), step(2), *began(1, 2), step(2), step(3)])
    assert history.done == {"steps": 4, "samples": 16, "void": 1}
    assert (history.step_seconds, history.phase_seconds["computing"]) == (2.0, 1.0)


def test_what_was_read_at_once_is_what_comes_bit_by_bit() -> None:
    events = [*began(0), *map(step, range(1, 9)), failed("rank"), *began(4, 2), *map(step, range(5, 9)), skipped(9)]
    history = RunHistory()
    for each in events:
        history.add(each)
    at_once = RunHistory.of(events)
    assert {name: list(column) for name, column in history.steps.columns.items()} == {
        name: list(column) for name, column in at_once.steps.columns.items()
    }
    assert history.times.seconds == at_once.times.seconds and asdict(history.saves) == asdict(at_once.saves)


@pytest.mark.parametrize(
    ("before", "nodes", "number", "reason"),
    [
        ([failed("rank")], 1, 2, "rank"),
        ([failed("agent")], 1, 2, "agent"),
        ([failed("machine")], 1, 2, "machine"),
        ([event("hung", verdict="", suspects=[], stacks=""), failed("hang")], 1, 2, "hang"),
        ([event("preempted", reason="a node is to be drained")], 1, 2, "preemption"),
        ([event("preempted", reason="there are machines again")], 2, 2, "growth"),
        ([], 1, 1, "command"),
        ([failed("rank"), event("failed", error="")], 1, 1, "command"),
    ],
)
def test_restarts_are_counted_by_what_had_ended_the_life_before(
    before: list[Event], nodes: int, number: int, reason: str
) -> None:
    history = RunHistory.of([*began(0), step(1), *before, *began(0, number, nodes)])
    assert history.restarts == {reason: 1} and history.num_lives == 2


PLANNED = {"step_seconds": 0.5, "tokens_per_second": 64.0, "mfu": 0.25, "memory_bytes": 100.0}
MEASURED = {"step_seconds": 0.625, "tokens_per_second": 51.2, "mfu": 0.2, "memory_bytes": 110}


def planned(**changes: float) -> Event:
    return event("planned", nodes=1, layout="any", device="any", **PLANNED | changes)


def checked(memory_bytes: int | None = 110) -> Event:
    of_plan = {f"planned_{name}": value for name, value in PLANNED.items()}
    return event("plan_checked", num_steps=9, **of_plan, **MEASURED | {"memory_bytes": memory_bytes})


def test_a_plan_stands_beside_what_came_until_there_is_another() -> None:
    facts = Facts.of(from_tree({"name": "lion"}))
    history = RunHistory.of(began(0))
    assert foresight.of(history) is None and view_of(history, facts, 1e6)["plan"] is None
    history.add(planned())
    assert foresight.of(history) == {name: {"planned": value, "measured": None} for name, value in PLANNED.items()}
    history.add(checked())
    both = {name: {"planned": value, "measured": MEASURED[name]} for name, value in PLANNED.items()}
    assert foresight.of(history) == both == view_of(history, facts, 1e6)["plan"]
    history.add(planned(step_seconds=2.0))
    found = foresight.of(history)
    assert found is not None and found["step_seconds"] == {"planned": 2.0, "measured": None}
    history.add(checked(memory_bytes=None))
    found = foresight.of(history)
    assert found is not None and found["memory_bytes"]["measured"] is None
    history.add(event("unplanned", nodes=1, layout="any", reason="any"))
    assert foresight.of(history) is None and not history.num_unreadable
    history.add(event("planned", step_seconds=None))
    assert history.num_unreadable == 1 and foresight.of(history) is None


def test_what_ended_a_life_is_not_the_end_of_the_run() -> None:
    """As when a machine is drained, or the run grows: the ranks save, and others go on."""
    events = [event("stage_started", stage="train"), *began(0), step(1), event("preempted", reason="drained", step=1)]
    history = RunHistory.of(events)
    assert state_of(history) == "preempted"
    history = RunHistory.of([*events, *began(1, 2), step(2)])
    assert state_of(history) == "training" and history.end is not None and history.end["kind"] == "stage_started"


def test_evaluations_of_void_steps_do_not_count() -> None:
    def evaluated(at: int) -> Event:
        return event("evaluated", step=at, loss=9.0 - at, uniform_loss=9.0, unigram_loss=7.0)

    steps = [step(1), step(2), evaluated(2), step(3), step(4), evaluated(4)]
    history = RunHistory.of([*began(0), evaluated(0), *steps, *began(3, 2)])
    assert [each["step"] for each in history.evaluated] == [0, 2]


def test_of_a_long_run_looks_at_ranks_are_kept_from_all_of_it() -> None:
    """Evenly, and a rank that was slow at one look is seen to be."""
    facts = {"group": 1, "min": 1.0, "mean": 1.0, "max": 1.0, "slowest": 0}
    slow = {at: [1.0, 5.0] for at in range(1000, 20_001, 1000)}
    looks = [event("ranks", step=at, seconds=slow.get(at, [1.0, 2.0]), **facts) for at in range(1, 20_001)]
    history = RunHistory.of([*began(0), *looks])
    steps = [each["step"] for each in history.ranks]
    assert 400 < len(steps) <= 1001 and steps[-1] == 20_000
    assert max(after - before for before, after in pairwise(steps)) <= 2 * (20_000 / len(steps))
    assert sum(each["seconds"] == [1.0, 5.0] for each in history.ranks) == 20


def test_looks_at_different_layouts_do_not_become_one() -> None:
    facts = {"group": 1, "min": 1.0, "mean": 1.0, "max": 1.0, "slowest": 0}
    looks = [event("ranks", step=at, seconds=[1.0] * (4 if at < 1501 else 2), **facts) for at in range(1, 3001)]
    assert {len(each["seconds"]) for each in RunHistory.of([*began(0), *looks]).ranks} == {2, 4}


def test_the_speed_of_many_steps_is_all_tokens_by_all_time() -> None:
    facts = Facts.of(from_tree({"name": "lion"}))
    steps = [{**step(at), "seconds": 1.0 if at % 2 else 9.0} for at in range(1, 4001)]
    curve = view_of(RunHistory.of([*began(0), *steps]), facts, 0.0)["curves"]["tokens_per_second"]["value"]
    assert len(curve) == 1000 and curve == pytest.approx([2 * 4 * facts.seq_length / 10] * 1000, rel=1e-4)


def test_a_save_that_had_to_wait_held_training_up_once() -> None:
    waited = event("checkpoint_waited", step=8, seconds=2.0)
    snapshot = event("checkpoint_snapshot", step=8, durable=True, seconds=2.5)
    other = event("checkpoint_snapshot", step=9, durable=True, seconds=0.5)
    assert RunHistory.of([waited, snapshot, other]).saves.stall_seconds == 3.0
    assert RunHistory.of([waited]).saves.stall_seconds == 2.0


def test_an_old_failure_does_not_explain_a_later_restart() -> None:
    events = [*began(0), failed("rank"), *began(0, 2), event("preempted", reason=""), *began(0, 3)]
    assert RunHistory.of(events).restarts == {"rank": 1, "preemption": 1}


def test_stages_take_their_time_and_one_that_was_cut_off_ends_with_its_last_word() -> None:
    def at(time: float, kind: str, **fields: object) -> Event:
        return {"time": time, "kind": kind, **fields}

    events = [
        at(0, "run_started", resumed=False),
        at(0, "stage_started", stage="prepare"),
        at(7, "stage_finished", stage="prepare"),
        at(8, "stage_started", stage="train"),
        at(12, "generated", text="a word"),
        at(5000, "run_started", resumed=True),
        at(5001, "stage_started", stage="train"),
        at(5011, "stage_finished", stage="train"),
    ]
    assert RunHistory.of(events).stage_seconds == {"prepare": 7, "train": 14}


BROKEN: list[Event] = [
    {"kind": "step"},
    {"kind": "step", "time": "yesterday"},
    {**step(2), "loss": None},
    {**step(2), "tokens": "many"},
    {**step(2), "step": 2**80},
    {**step(2), "phases": 7},
    {"kind": "training_started", "time": 1.0},
    {"kind": "training_started", "time": 1.0, "step": "first"},
    {"kind": "life_started", "time": 1.0, "number": None},
    {"kind": "step_skipped", "time": 1.0, "step": 1},
    {"kind": "checkpoint_saved", "time": 1.0},
    {"kind": "rolled_back", "time": 1.0, "to_step": []},
    {"kind": "stage_started", "time": 1.0},
]


@pytest.mark.parametrize("broken", BROKEN)
def test_an_event_that_is_broken_is_counted_and_costs_no_other(broken: Event) -> None:
    history = RunHistory.of([*began(0), step(1), broken, step(2), step(3)])
    assert history.num_unreadable == 1
    assert list(history.steps["step"]) == [1, 2, 3]
    assert {len(column) for column in history.steps.columns.values()} == {3}
    assert all(seconds >= 0 for seconds in history.times.seconds.values())


def test_what_other_versions_record_is_passed_over() -> None:
    history = RunHistory.of([*began(0), event("sunrise", colour="red"), step(1), {**step(2), "phases": None}])
    assert list(history.steps["step"]) == [1, 2] and not history.num_unreadable
