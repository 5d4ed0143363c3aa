"""Who is slow, by what ranks say of their time."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from launcher.supervise.stragglers import Straggler, Streaks, find
from launcher.supervise.watch import Watch
from trainer.config import SuperviseConfig
from trainer.heartbeat import PHASES, Beat, Phase

NUM_STEPS = 20
START = Beat(77, 5, 7, 100, 50, "computing", 0.0, 0.0, dict.fromkeys(PHASES, 3.0), dict.fromkeys(PHASES, 1.0))


def synchronous(own: list[dict[Phase, float]]) -> tuple[dict[int, Beat], dict[int, Beat]]:
    """Two looks at ranks that need so many seconds a step for themselves, and wait for the slowest in computing."""
    step_seconds = max(sum(each.values()) for each in own)
    later = {}
    for rank, each in enumerate(own):
        wait = step_seconds - sum(each.values())
        spent = {**each, "computing": each["computing"] + wait}
        later[rank] = after(START, NUM_STEPS, spent, {"computing": wait})
    return dict.fromkeys(range(len(own)), START), later


def after(beat: Beat, num_steps: int, seconds: Mapping[Phase, float], waited: Mapping[Phase, float]) -> Beat:
    """`seconds` and `waited` a step."""
    return replace(
        beat,
        step=beat.step + num_steps,
        num_steps=beat.num_steps + num_steps,
        seconds={phase: beat.seconds[phase] + num_steps * seconds.get(phase, 0.0) for phase in PHASES},
        waited={phase: beat.waited[phase] + num_steps * waited.get(phase, 0.0) for phase in PHASES},
    )


def rank(loading: float = 0.01, computing: float = 1.0) -> dict[Phase, float]:
    return {"loading data": loading, "computing": computing, "agreeing": 0.01}


def test_a_rank_that_reads_slowly_is_found() -> None:
    (found,) = find(*synchronous([rank(), rank(), rank(loading=1.03), rank()]), 1.5)
    assert (found.rank, found.phase, found.ratio) == (2, "loading data", pytest.approx(2.0))


def test_a_rank_that_computes_slowly_is_found_though_all_take_as_long() -> None:
    earlier, later = synchronous([rank(), rank(computing=2.02), rank()])
    assert [beat.seconds["computing"] for beat in later.values()] == pytest.approx([later[0].seconds["computing"]] * 3)
    (found,) = find(earlier, later, 1.5)
    assert (found.rank, found.phase, found.ratio) == (1, "computing", pytest.approx(2.0))


def test_of_two_ranks_the_slower_is_found() -> None:
    assert [each.rank for each in find(*synchronous([rank(), rank(computing=3.0)]), 2)] == [1]


def test_the_worst_comes_first() -> None:
    found = find(*synchronous([rank(), rank(), rank(computing=2.0), rank(loading=3.0), rank()]), 1.2)
    assert [(each.rank, each.phase) for each in found] == [(3, "loading data"), (2, "computing")]


def test_jitter_of_what_takes_no_time_is_nothing() -> None:
    """A rank loads a thousand times as long as the others, and nobody would notice."""
    assert find(*synchronous([rank(loading=1e-5), rank(loading=1e-5), rank(loading=1e-2)]), 1.1) == []


def test_saving_and_evaluating_are_no_part_of_a_step() -> None:
    earlier, later = synchronous([rank()] * 3)
    later[1] = replace(later[1], seconds={**later[1].seconds, "saving": 900.0, "evaluating": 900.0})
    assert find(earlier, later, 1.01) == []


@pytest.mark.parametrize(
    "begun_anew", [{"pid": 78}, {"start_ticks": 6}, {"num_steps": START.num_steps + 2}, {"num_steps": 1}]
)
def test_what_cannot_be_compared_is_passed_over(begun_anew: dict[str, int]) -> None:
    earlier, later = synchronous([rank(), rank(), rank(computing=4.0), rank()])
    assert [each.rank for each in find(earlier, later, 1.5)] == [2]
    assert find(earlier, {**later, 2: replace(later[2], **begun_anew)}, 1.5) == []  # type: ignore[arg-type]
    assert find({number: beat for number, beat in earlier.items() if number != 2}, later, 1.5) == []
    assert find(earlier, {number: beat for number, beat in later.items() if number != 2}, 1.5) == []


def test_a_rank_alone_is_no_straggler() -> None:
    assert find(*synchronous([rank()]), 1.0) == []
    assert find({}, {}, 1.0) == []


seconds = st.floats(0.05, 1.0)
ranks = st.lists(st.tuples(seconds, seconds).map(lambda pair: rank(*pair)), min_size=3, max_size=9)


@given(ranks, st.data(), st.sampled_from(["loading data", "computing"]), st.floats(3.0, 50.0))
def test_one_rank_that_is_much_slower_is_always_named(
    own: list[dict[Phase, float]], data: st.DataObject, phase: Phase, extra: float
) -> None:
    slow = data.draw(st.integers(0, len(own) - 1))
    own[slow] = {**own[slow], phase: own[slow][phase] + extra}
    found = find(*synchronous(own), 1.2)
    assert (found[0].rank, found[0].phase) == (slow, phase)
    assert len(found) == 1 or found[0].ratio > found[1].ratio


@given(ranks, st.floats(1.0, 3.0), st.floats(1e-3, 1e3))
def test_what_is_found_depends_on_neither_the_units_nor_the_order(
    own: list[dict[Phase, float]], factor: float, unit: float
) -> None:
    found = find(*synchronous(own), factor)
    assume(all(abs(each.ratio - factor) > 1e-6 for each in find(*synchronous(own), 0.0)))
    scaled = [{phase: unit * value for phase, value in each.items()} for each in own]
    assert {each.rank for each in find(*synchronous(scaled), factor)} == {each.rank for each in found}
    backwards = find(*synchronous(own[::-1]), factor)
    assert {len(own) - 1 - each.rank for each in backwards} == {each.rank for each in found}


@given(ranks)
def test_ranks_that_are_alike_are_no_stragglers(own: list[dict[Phase, float]]) -> None:
    assert find(*synchronous([own[0]] * len(own)), 1.001) == []


def test_only_who_is_found_again_and_again_is_told_and_told_once() -> None:
    def found(*ranks: int) -> list[Straggler]:
        return [Straggler(rank, "computing", 2.0) for rank in ranks]

    streaks, told = Streaks(), []
    for look in (found(1, 2), found(1), found(1, 2), found(1, 2), found(2), found(), found(2), found(2), found(2)):
        streaks = streaks.after(look)
        told.append(streaks.reached(3))
    assert told == [[], [], [1], [], [2], [], [], [], [2]]


def test_where_there_is_no_memory_for_beats_steps_are_what_is_heard() -> None:
    watch, now = Watch(SuperviseConfig(hang_seconds=10.0), 0.0), 0.0
    for _ in range(100):
        now += 5
        watch.step_took(5.0, now)
        watch.saw({}, now)
        assert not watch.is_hung(now)
    assert watch.is_hung(now + 601)  # outside of steps, for all that is known: six times 20 steps of 5 s


def test_slow_steps_are_looked_at_over_as_long_as_it_takes() -> None:
    """A look every second at a run that does a step in as long: five of them make a look that counts."""
    watch = Watch(SuperviseConfig(straggler_seconds=1.0, straggler_factor=1.5), 0.0)
    beats = dict.fromkeys(range(3), START)
    named = {}
    for second in range(1, 30):
        for slow, beat in beats.items():
            own = 1.0 if slow == 2 else 0.4
            beats[slow] = after(beat, 1, {"computing": 1.0}, {"computing": 1.0 - own})
        for found in watch.saw(dict(beats), float(second)):
            named[second] = (found.rank, found.ratio)
    assert named == {16: (2, pytest.approx(2.5))}
