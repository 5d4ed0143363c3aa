"""Where the time of a run went: every second of training once, and each where a person would say it went."""

import random

import pytest

from launcher.history.history import RunHistory
from launcher.history.times import Times
from trainer.events import Event


class Record:
    """Events of a made-up run, at the times that are told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.now = 1000.0

    def after(self, seconds: float, kind: str, /, **fields: object) -> "Record":
        self.now += seconds
        self.events.append({"time": self.now, "kind": kind, **fields})
        return self

    def begin(self, startup: float = 5.0) -> "Record":
        self.after(0, "stage_started", stage="train").after(1, "life_started", number=1, nodes=1, data=1, why="")
        return self.after(startup - 1, "training_started", step=0, checkpoint=None, tier="disk")

    def steps(self, first: int, last: int, seconds: float = 2.0, data: float = 0.0, gap: float = 0.0) -> "Record":
        for step in range(first, last + 1):
            self.after(
                seconds + gap,
                "step",
                step=step,
                seconds=seconds,
                tokens=10 * step,
                num_samples=1,
                loss=1.0,
                grad_norm=1.0,
                lr=0.1,
                phases={"loading data": data},
            )
        return self

    def evaluated(self, seconds: float) -> "Record":
        return self.after(seconds, "evaluated", step=0, loss=1.0, uniform_loss=2.0, unigram_loss=2.0)

    def times(self) -> dict[str, float]:
        found = RunHistory.of(self.events).times.seconds
        return {state: round(seconds, 6) for state, seconds in found.items() if seconds}


def test_steps_are_productive_less_their_wait_for_data_and_what_lies_between_is_a_stall() -> None:
    record = Record().begin(startup=5).steps(1, 10, seconds=2.0, data=0.5, gap=0.25)
    assert record.times() == {"startup": 5.0, "productive": 15.0, "stall": 7.5}


def test_a_failure_costs_what_it_cut_off_what_became_void_and_the_time_until_ranks_train_again() -> None:
    record = Record().begin().steps(1, 10)
    record.after(1.5, "life_failed", what="rank", error="", machine="", step=10)
    record.after(0.5, "life_started", number=2, nodes=1, data=1, why="")
    record.after(3.0, "training_started", step=8, checkpoint=None, tier="memory").steps(9, 10)
    assert record.times() == {"startup": 5.0, "productive": 20.0, "lost": 1.5 + 2 * 2.0, "recovery": 3.5}


def test_a_rollback_makes_steps_void_and_the_skipped_ones_are_lost() -> None:
    record = Record().begin().steps(1, 6)
    skip = {"first_sample": 0, "num_samples": 1, "reason": "loss spike"}
    record.after(2, "step_skipped", step=7, **skip).after(2, "step_skipped", step=8, **skip)
    record.after(4, "rolled_back", from_step=8, to_step=4, reason="loss spike").steps(5, 6)
    assert record.times() == {"startup": 5.0, "productive": 12.0, "lost": 4.0 + 4.0, "recovery": 4.0}


def test_saving_costs_what_training_stood_still_for() -> None:
    record = Record().begin().steps(1, 1)
    record.after(0.5, "checkpoint_waited", step=1, seconds=0.4)
    record.after(0.25, "checkpoint_snapshot", step=1, durable=True, seconds=0.25).steps(2, 2)
    record.after(0.0, "checkpoint_saved", step=1, bytes=9, seconds=1.9).steps(3, 3)  # beside training
    assert record.times() == {"startup": 5.0, "productive": 6.0, "checkpoint": 0.65, "stall": 0.1}


def test_a_save_that_had_no_snapshot_held_training_up_for_all_its_time() -> None:
    record = Record().begin().steps(1, 1).after(3.0, "checkpoint_saved", step=1, bytes=9, seconds=3.0).steps(2, 2)
    assert record.times() == {"startup": 5.0, "productive": 4.0, "checkpoint": 3.0}


def test_a_hang_is_a_stall_until_it_is_known_and_recovery_from_then_on() -> None:
    record = Record().begin().steps(1, 3).after(60, "hung", verdict="", suspects=[], stacks="")
    record.after(2, "life_failed", what="hang", error="", machine="", step=3)
    record.after(1, "life_started", number=2, nodes=1, data=1, why="")
    record.after(4, "training_started", step=3, checkpoint=None, tier="memory")
    assert record.times() == {"startup": 5.0, "productive": 6.0, "stall": 60.0, "recovery": 7.0}


def test_nobody_trains_between_two_commands() -> None:
    record = Record().begin().steps(1, 3).evaluated(1).after(1, "preempted", reason="", step=3)
    record.after(10_000, "run_started", resumed=True)
    record.after(0, "stage_started", stage="prepare").after(7, "stage_finished", stage="prepare")
    record.begin(startup=3).steps(1, 3).after(2, "stage_finished", stage="train").after(500, "stage_started", stage="x")
    assert record.times() == {"startup": 8.0, "productive": 6.0, "lost": 6.0, "evaluation": 1.0, "checkpoint": 3.0}


def test_a_killed_command_costs_what_it_had_recorded() -> None:
    record = Record().begin().steps(1, 3)
    record.now += 5000  # nothing more was written
    record.begin(startup=4)
    assert record.times() == {"startup": 9.0, "lost": 6.0}


def test_time_that_has_not_come_to_an_event_is_told_too() -> None:
    record = Record().begin().steps(1, 3)
    times = RunHistory.of(record.events).times
    assert times.until(record.now + 1)["productive"] == pytest.approx(7.0)
    assert times.until(record.now + 100)["stall"] == pytest.approx(100.0)  # steps take 2 s
    assert times.until(record.now - 5) == times.seconds  # of a clock that was set back
    assert sum(times.until(record.now + 100).values()) == pytest.approx(111.0)


def test_every_second_counts_once_whatever_happens() -> None:
    draw = random.Random(5)
    for _ in range(50):
        record, step, number = Record().begin(), 0, 1
        for _ in range(100):
            match draw.randrange(6):
                case 0 | 1:
                    seconds = draw.uniform(0.1, 3)
                    record.steps(step + 1, step + 1, seconds, data=draw.uniform(0, 2 * seconds), gap=draw.random())
                    step += 1
                case 2:
                    record.evaluated(draw.random())
                case 3:
                    record.after(draw.random(), "checkpoint_snapshot", step=step, durable=True, seconds=draw.random())
                case 4:
                    record.after(draw.random(), "life_failed", what="rank", error="", machine="", step=step)
                    number += 1
                    record.after(draw.random(), "life_started", number=number, nodes=1, data=1, why="")
                    step = draw.randrange(step + 1)
                    record.after(draw.random(), "training_started", step=step, checkpoint=None, tier="disk")
                case 5:
                    back = draw.randrange(step + 1)
                    record.after(draw.random(), "rolled_back", from_step=step, to_step=back, reason="")
                    step = back
        times = RunHistory.of(record.events).times
        assert times.total_seconds == pytest.approx(record.now - 1000.0)
        assert all(seconds >= -1e-9 for seconds in times.seconds.values())


def test_without_an_event_no_time_has_passed() -> None:
    assert Times().until(1e9) == Times().seconds
