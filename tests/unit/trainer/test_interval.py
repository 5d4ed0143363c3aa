"""When a checkpoint is due, and whether Daly's optimum is one."""

import math
from typing import Any

import numpy as np
import pytest

from trainer.checkpoint import interval
from trainer.checkpoint.interval import FailureHistory, Moment, is_due
from trainer.config import CheckpointConfig

# ------------------------------------------------------------------------------------------------------------------ due


@pytest.mark.parametrize(
    ("saved", "now", "due"),
    [(0, 1, False), (0, 9, False), (0, 10, True), (10, 19, False), (10, 20, True), (12, 20, True), (12, 35, True)],
)
def test_steps_are_counted_from_the_start_of_the_run(saved: int, now: int, due: bool) -> None:
    """A save that came late, or a resume in between, moves no later one."""
    assert is_due(CheckpointConfig(every_steps=10), Moment(saved, 0.0), Moment(now, 1e9)) == due


def test_time_is_counted_from_the_last_save() -> None:
    config = CheckpointConfig(every_seconds=30.0)
    saved = Moment(5000, 100.0)
    assert not is_due(config, saved, Moment(9000, 129.9))
    assert is_due(config, saved, Moment(5001, 130.0))
    assert not is_due(config, saved, Moment(5000, 999.0)), "there is nothing new to save"


def test_whichever_comes_first_of_steps_and_time() -> None:
    config = CheckpointConfig(every_steps=10, every_seconds=30.0)
    saved = Moment(10, 100.0)
    assert [is_due(config, saved, Moment(*now)) for now in ((19, 129.0), (20, 101.0), (11, 130.0))] == [
        False,
        True,
        True,
    ]


def test_by_default_every_thousand_steps_and_no_time() -> None:
    config = CheckpointConfig()
    assert not is_due(config, Moment(0, 0.0), Moment(999, 1e9)) and is_due(config, Moment(0, 0.0), Moment(1000, 1.0))


def test_auto_takes_the_interval_that_it_is_given() -> None:
    config = CheckpointConfig(every_seconds="auto")
    saved = Moment(0, 0.0)
    assert not is_due(config, saved, Moment(5000, 59.0)) and is_due(config, saved, Moment(5000, 60.0))
    assert not is_due(config, saved, Moment(5000, 60.0), 500.0) and is_due(config, saved, Moment(1, 500.0), 500.0)


# ----------------------------------------------------------------------------------------------------- Daly's optimum


def lost_share(interval_seconds: float, cost: float, lives: np.ndarray[Any, Any]) -> float:
    """Share of the time that is not kept work, simulated: `lives` [number] are times from one failure to the next.

    A life repeats to work and to save; a save that is not complete when the life ends keeps nothing.
    """
    saves = np.floor(lives / (interval_seconds + cost))
    return float(1 - saves.sum() * interval_seconds / lives.sum())


@pytest.mark.parametrize("cost", [0.5, 10.0, 120.0, 900.0])
def test_the_optimum_loses_least_in_a_simulation_of_failures(cost: float) -> None:
    mean = 1000.0
    lives = np.random.default_rng(7).exponential(mean, 1_000_000)
    optimum = interval.daly_seconds(cost, mean)
    losses = {factor: lost_share(factor * optimum, cost, lives) for factor in (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)}
    best = min(lost_share(factor * optimum, cost, lives) for factor in np.linspace(0.3, 3.0, 55))
    assert losses[1.0] == pytest.approx(best, rel=0.01)
    assert losses[0.25] > losses[0.5] > losses[0.8] > losses[1.0] < losses[1.25] < losses[2.0] < losses[4.0]


@pytest.mark.parametrize("cost", [1.0, 10.0, 100.0, 200.0])
def test_the_closed_form_is_near_the_minimum_of_the_model_that_it_approximates(cost: float) -> None:
    """Daly's expected run time, up to factors that do not depend on the interval, minimised by trying."""
    intervals = np.linspace(0.1, 1.5, 1_000_001) * math.sqrt(2 * cost * 1000.0)
    best = intervals[np.argmin(np.expm1((intervals + cost) / 1000.0) / intervals)]
    assert interval.daly_seconds(cost, 1000.0) == pytest.approx(best, rel=2e-3)


def test_the_simulation_agrees_with_the_first_order_cost_it_is_compared_by() -> None:
    """Young: the share lost is cost / interval + interval / 2 M where both are small."""
    lives = np.random.default_rng(7).exponential(1000.0, 1_000_000)
    young = math.sqrt(2 * 0.1 * 1000.0)
    assert lost_share(young, 0.1, lives) == pytest.approx(0.1 / young + young / 2000.0, rel=0.01)


def test_young_is_the_first_term_and_a_save_as_long_as_two_lives_is_never_worth_it() -> None:
    assert interval.daly_seconds(1e-6, 1e6) == pytest.approx(math.sqrt(2.0), rel=1e-5)
    assert interval.daly_seconds(2000.0, 1000.0) == interval.daly_seconds(1e9, 1000.0) == 1000.0
    assert interval.daly_seconds(0.0, 1000.0) == 0.0


# ---------------------------------------------------------------------------------------------------- cost and failures


def test_the_published_rate_is_what_the_paper_reports() -> None:
    rank_hours = interval.PUBLISHED_RANK_SECONDS_PER_FAILURE / 3600
    assert rank_hours == pytest.approx(50_700, rel=1e-3)
    hours = interval.mean_seconds_between_failures(FailureHistory(), 16384) / 3600
    assert hours == pytest.approx(54 * 24 / 419)


def test_what_a_run_sees_outweighs_what_was_published() -> None:
    """A run that fails every 1000 s ends up near that, one that never fails beyond the published time."""
    failing = FailureHistory(num_failures=999, trained_seconds=999e3)
    assert interval.mean_seconds_between_failures(failing, 16384) == pytest.approx(1000.0, rel=0.02)
    published = interval.mean_seconds_between_failures(FailureHistory(), 16384)
    assert interval.mean_seconds_between_failures(FailureHistory(0, 3 * published), 16384) == 4 * published
    assert interval.mean_seconds_between_failures(FailureHistory(1, 0.0), 16384) == published / 2


def test_the_interval_stays_within_its_bounds() -> None:
    def seconds(*stalls: float, failures: int = 0, ranks: int = 16384) -> float:
        return interval.optimal_seconds(FailureHistory(failures, 0.0, stalls), ranks)

    assert seconds() == interval.FIRST_INTERVAL_SECONDS
    published = interval.mean_seconds_between_failures(FailureHistory(), 16384)
    assert seconds(10.0) == pytest.approx(interval.daly_seconds(10.0, published)) == pytest.approx(466.0, rel=0.01)
    assert seconds(10.0, ranks=8) == interval.LONGEST_INTERVAL_SECONDS
    assert seconds(10.0, failures=10**6) == 100.0, "at most one second in eleven goes into saving"
    assert seconds(600.0) == 6000.0, "which also holds where saves are slow"
    assert seconds(9.0, 9.0, 3.0, 1.0, 99.0, 2.0, 3.0) == seconds(3.0), "the median of the last five"


# ------------------------------------------------------------------------------------------------------ from the events


def events(*lines: tuple[float, str] | tuple[float, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"time": time, "kind": kind, **(fields[0] if fields else {})} for time, kind, *fields in lines]


def test_failures_and_time_are_read_from_the_events() -> None:
    found = interval.read_history(
        events(
            (0, "run_started"),
            (5, "stage_finished", {"stage": "prepare"}),
            (10, "training_started"),
            (20, "step"),
            (30, "step"),  # killed
            (100, "training_started"),
            (150, "step_skipped"),
            (151, "preempted"),
            (900, "training_started"),  # dies before its first step
            (1000, "training_started"),
            (1010, "rolled_back"),
            (1100, "step"),
            (1110, "diverged"),
            (1111, "failed"),
            (2000, "training_started"),
            (2007, "step"),
            (2008, "failed"),
            (3000, "training_started"),
            (3001, "step"),
            (3002, "stage_finished", {"stage": "train"}),
            (4000, "training_started"),
            (4003, "step"),  # killed just now
        )
    )
    assert found.num_failures == 3  # the two that were killed, and the one that failed
    assert found.trained_seconds == 20 + 50 + 100 + 7 + 1 + 3


def test_no_events_are_no_failures() -> None:
    assert interval.read_history([]) == FailureHistory()
    assert interval.read_history(events((1, "training_started"))) == FailureHistory()


def test_a_stall_is_the_snapshot_where_there_is_one_and_else_the_whole_save() -> None:
    def save(kind: str, step: int, seconds: float) -> tuple[float, str, dict[str, Any]]:
        return (0.0, f"checkpoint_{kind}", {"step": step, "seconds": seconds})

    found = interval.read_history(
        events(
            (0.0, "training_started"),
            save("snapshot", 10, 0.1),
            save("snapshot", 20, 0.2),
            save("saved", 10, 9.0),
            save("saved", 20, 9.0),
            save("saved", 30, 3.0),
            save("snapshot", 40, 0.4),
            (0.0, "training_started"),
            save("saved", 20, 4.0),
            save("saved", 40, 9.0),  # the service has outlived the ranks
        )
    )
    assert found.stall_seconds == (0.1, 0.2, 3.0, 0.4, 4.0)
