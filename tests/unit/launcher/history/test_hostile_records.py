"""Whatever stands in a record, everything that is drawn from it can be drawn: a broken event costs itself alone."""

import json
import math
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.exposition import expose
from launcher.history.history import RunHistory
from launcher.history.values import Facts, run_values
from launcher.history.view import view_of
from launcher.monitor.sinks.sink import values_of
from launcher.report.events import line_of
from trainer.config_file import from_tree
from trainer.events import Event
from unit.launcher.test_metrics import events

FACTS = Facts.of(from_tree({"name": "lion"}))
MORE: list[Event] = [
    {
        "time": 1060.0,
        "kind": "rolled_back",
        "from_step": 21,
        "to_step": 20,
        "reason": "loss spike",
        "quarantined": [21],
    },
    {"time": 1061.0, "kind": "hung", "verdict": "rank 1 is stopped", "suspects": [1], "stacks": "path"},
    {"time": 1062.0, "kind": "checkpoint_waited", "step": 20, "seconds": 0.5},
    {"time": 1063.0, "kind": "checkpoint_skipped", "step": 20, "durable": True, "reason": "busy"},
    {"time": 1064.0, "kind": "machine_excluded", "machine": "abc", "failures": 3},
    {"time": 1065.0, "kind": "preempted", "reason": "asked", "step": 20, "saved_step": 20},
    {"time": 1066.0, "kind": "export_verified", "how": "full", "largest_difference": 0.0, "tokens": 9},
    {"time": 1067.0, "kind": "stage_finished", "stage": "train", "seconds": 60.0, "result": "learned"},
    {"time": 1068.0, "kind": "run_finished", "seconds": 70.0},
]
SOUND = [*events(), *MORE]

odd = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 3), st.just(2**70), st.just(-1.5), st.just(1e308), st.just("x")),
    *(st.just([]), st.just(["x"]), st.just([1, "x"]), st.just({}), st.just({"x": 1}), st.just({"x": {"tokens": "y"}})),
    *(st.just(""), st.just("\x1b[31m</script>")),
)
harm = st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 20), st.one_of(st.just("gone"), odd))


def harmed(harms: list[tuple[int, int, Any]]) -> list[Event]:
    """The record with some fields of some events gone or changed; an event without a kind is none for its reader."""
    record = [dict(event) for event in SOUND]
    for place, number, value in harms:
        event = record[place]
        name = sorted(event)[number % len(event)]
        if name == "kind":
            continue
        if value == "gone" and isinstance(value, str):
            del event[name]
        else:
            event[name] = value
    return record


@settings(max_examples=400, deadline=None)
@given(st.lists(harm, min_size=1, max_size=6))
def test_no_record_keeps_anybody_from_seeing_the_rest(harms: list[tuple[int, int, Any]]) -> None:
    history = RunHistory()
    for event in harmed(harms):
        history.add(event)
        line_of(event)
    page, _ = expose(run_values(history, FACTS, 2000.0, 1.0), "application/openmetrics-text")
    assert page.endswith(b"# EOF\n")
    json.dumps(view_of(history, FACTS, 2000.0), default=lambda array: array.tolist())
    assert {len(column) for column in history.steps.columns.values()} == {len(history.steps)}
    assert all(one < next for one, next in pairwise(history.steps["step"]))
    assert all(seconds >= 0 and math.isfinite(seconds) for seconds in history.times.seconds.values())


@given(st.lists(harm, min_size=1, max_size=6))
def test_a_record_is_told_to_sinks_or_refused_by_an_error_that_they_catch(harms: list[tuple[int, int, Any]]) -> None:
    history = RunHistory()
    for event in harmed(harms):
        history.add(event)
        try:
            values_of(event, history, FACTS)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError):
            continue


def test_a_record_that_is_sound_has_no_broken_event() -> None:
    assert RunHistory.of(SOUND).num_unreadable == 0
