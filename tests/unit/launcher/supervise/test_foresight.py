"""A layout is planned when its ranks begin, and checked once, whatever becomes of them; nothing of it ends a run."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.planning.cluster import load
from launcher.planning.planner import Plan, make_plan
from launcher.sizing import sizes
from launcher.supervise import foresight
from launcher.supervise.foresight import NUM_STEPS, Foresight
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.events import Event
from trainer.heartbeat import Beat, Memory

H100 = "NVIDIA H100 80GB HBM3"
RUN = from_tree(
    {
        "preset": "gpt2_xl",
        "train": {"global_batch_size": 64, "micro_batch_size": 4, "ramp_start_batch_size": None, "ramp_tokens": 0},
        "parallel": {"data": 4},
        "launch": {"nodes": 4, "device": "cuda"},
    }
)


class Record:
    """As `EventLog` writes it."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, kind: str, **fields: Any) -> None:
        self.events.append({"time": float(len(self.events)), "kind": kind, **fields})

    def foresight(self, *, on_gpus: bool = True) -> Foresight:
        """Of a command that begins now."""
        return Foresight(self.write, list(self.events), on_gpus=on_gpus)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]


def step(number: int, seconds: float = 1.0, num_samples: int = 64) -> Event:
    return {"time": 0.0, "kind": "step", "step": number, "seconds": seconds, "num_samples": num_samples}


def beat(num_steps: int = 1, **memory: int) -> Beat:
    return Beat(*(1, 1, 1, num_steps, num_steps, "computing", 0.0, 0.0), {}, {}, memory=Memory(**memory))


def planned_of(run: RunConfig) -> Plan:
    """Without the time for which saving holds training up: steps do not include it."""
    plan = make_plan(run, load("h100"))
    assert plan.step.checkpoint > 0
    return replace(plan, step=replace(plan.step, checkpoint=0.0))


def train(watched: Foresight, num_steps: int, seconds: float = 1.0) -> None:
    """As the supervisor does: the first step is slow."""
    for number in range(1, num_steps + 1):
        watched.step_done(step(number, 60.0 if number == 1 else seconds))
        if watched.is_due:
            watched.check()


def test_ten_steps_are_compared_with_the_plan() -> None:
    record, plan = Record(), planned_of(RUN)
    watched = record.foresight()
    watched.began(RUN, H100)
    (planned,) = record.of("planned")
    assert (planned["step_seconds"], planned["memory_bytes"]) == (plan.step.seconds, plan.memory.total)
    assert (planned["device"], planned["nodes"]) == ("H100 80GB SXM", 4)
    assert planned["layout"] == RUN.parallel.describe()
    assert sum(planned["step_parts"].values()) == pytest.approx(planned["step_seconds"])
    assert sum(planned["memory_parts"].values()) == pytest.approx(planned["memory_bytes"])
    watched.saw({0: beat(taken=5, resident=99), 1: beat(taken=7), 2: beat(num_steps=0, taken=100)})
    watched.saw({0: beat(taken=6)})
    train(watched, NUM_STEPS - 1, 2 * plan.step.seconds)
    assert not record.of("plan_checked")
    train(watched, 5, 2 * plan.step.seconds)
    (found,) = record.of("plan_checked")
    assert found["memory_bytes"] == 7 and found["planned_memory_bytes"] == plan.memory.total
    assert found["step_seconds"] == pytest.approx(2 * plan.step.seconds, abs=1e-6) and found["num_steps"] == 9
    assert found["planned_step_seconds"] == plan.step.seconds
    assert found["tokens_per_second"] == pytest.approx(64 * 1024 / found["step_seconds"])
    assert found["mfu"] == pytest.approx(plan.mfu / 2, rel=1e-4)
    assert found["slow"]


@pytest.mark.parametrize(("ratio", "slow"), [(1.4, False), (1.6, True)])
def test_gpus_that_take_far_longer_are_told(ratio: float, slow: bool) -> None:
    record = Record()
    watched = record.foresight()
    watched.began(RUN, H100)
    train(watched, NUM_STEPS, ratio * record.of("planned")[0]["step_seconds"])
    assert record.of("plan_checked")[0]["slow"] is slow


def test_on_cpus_nothing_is_too_slow_and_memory_is_the_host_s() -> None:
    record = Record()
    watched = record.foresight(on_gpus=False)
    watched.began(RUN, "CPU")
    watched.saw({0: beat(resident=9)})
    train(watched, NUM_STEPS, 1e6)
    (found,) = record.of("plan_checked")
    assert not found["slow"] and found["memory_bytes"] == 9


def test_a_ramp_is_compared_with_the_plan_of_its_batch() -> None:
    record = Record()
    watched = record.foresight()
    watched.began(RUN, H100)
    small = planned_of(with_batch(16)).step.seconds
    for number in range(1, NUM_STEPS + 1):
        watched.step_done(step(number, small if number < 8 else 3.0, 16 if number < 8 else 32))
    watched.check()
    (found,) = record.of("plan_checked")
    assert found["num_samples"] == 32 and found["num_steps"] == 3 and found["step_seconds"] == 3.0
    assert found["planned_step_seconds"] == planned_of(with_batch(32)).step.seconds
    assert small < found["planned_step_seconds"] < record.of("planned")[0]["step_seconds"]


def with_batch(size: int) -> RunConfig:
    return RUN.model_copy(update={"train": RUN.train.model_copy(update={"global_batch_size": size})})


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_a_short_run_is_checked_by_what_it_has(num_steps: int) -> None:
    record = Record()
    watched = record.foresight()
    watched.began(RUN, H100)
    train(watched, num_steps)
    watched.check()
    assert [event["num_steps"] for event in record.of("plan_checked")] == ([num_steps - 1] if num_steps > 1 else [])


LIVES = st.lists(
    st.tuples(st.sampled_from(sorted(sizes(RUN))), st.integers(0, 2 * NUM_STEPS), st.booleans()), min_size=1, max_size=5
)


@settings(max_examples=25)
@given(LIVES)
def test_a_layout_that_changes_is_planned_anew_and_checked_once(lives: list[tuple[int, int, bool]]) -> None:
    """Lives on so many machines, of so many steps, by the same command or another."""
    record, configs = Record(), sizes(RUN)
    watched = record.foresight()
    expected_plans: list[int] = []
    expected_checks: list[int] = []
    for nodes, num_steps, by_another in lives:
        if by_another:
            watched = record.foresight()
        watched.began(configs[nodes], H100)
        if not expected_plans or expected_plans[-1] != nodes:
            expected_plans.append(nodes)
            is_checked = False
        train(watched, num_steps)
        if num_steps >= NUM_STEPS and not is_checked:
            expected_checks.append(nodes)
            is_checked = True
    assert [event["nodes"] for event in record.of("planned")] == expected_plans
    assert len(record.of("plan_checked")) == len(expected_checks)
    for event in record.of("planned"):
        assert event["step_seconds"] == planned_of(configs[event["nodes"]]).step.seconds
    fewer = sorted((event["nodes"], event["step_seconds"]) for event in record.of("planned"))
    assert all(more[1] <= less[1] for less, more in pairwise(fewer))


@pytest.mark.parametrize(
    ("run", "device", "reason"),
    [
        (RUN, "NVIDIA L4", "NVIDIA L4 is no device that comes along"),
        (RUN.model_copy(update={"launch": RUN.launch.model_copy(update={"cluster": "gone.yaml"})}), H100, "gone.yaml"),
    ],
)
def test_what_cannot_be_planned_is_said_once(run: RunConfig, device: str, reason: str) -> None:
    record = Record()
    for _ in range(2):
        watched = record.foresight()
        for _ in range(2):
            watched.began(run, device)
            train(watched, 2 * NUM_STEPS)
            watched.check()
    (told,) = record.events
    assert told["kind"] == "unplanned" and reason in told["reason"]


def test_a_fault_of_the_planner_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("in the planner")

    record = Record()
    watched = record.foresight()
    watched.began(RUN, H100)
    monkeypatch.setattr(foresight, "make_plan", broken)
    train(watched, NUM_STEPS)
    assert record.events[-1]["kind"] == "unplanned"
    watched.began(sizes(RUN)[2], H100)
    assert record.events[-1]["reason"] == "no plan could be made: ZeroDivisionError: in the planner"
