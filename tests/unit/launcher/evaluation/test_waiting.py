"""Which checkpoints are judged: none twice, none forgotten."""

from hypothesis import given
from hypothesis import strategies as st

from launcher.evaluation.waiting import Waiting

STEPS = st.integers(1, 20)
ACTS = st.lists(st.one_of(st.tuples(st.just("committed"), STEPS), st.tuples(st.just("void"), STEPS), st.just("next")))


def test_one_that_falls_behind_goes_on_with_the_newest() -> None:
    waiting, left_out = Waiting("skip").committed(10)
    assert left_out == ()
    waiting, left_out = waiting.committed(20)
    assert left_out == (10,)
    waiting, step = waiting.next()
    assert step == 20 and waiting.next()[1] is None


def test_a_queue_takes_all_in_order() -> None:
    waiting = Waiting("queue")
    for step in (10, 20, 30):
        waiting, left_out = waiting.committed(step)
        assert left_out == ()
    taken = []
    while (step := waiting.next()[1]) is not None:
        waiting = waiting.next()[0]
        taken.append(step)
    assert taken == [10, 20, 30]


def test_what_is_written_over_waits_once_and_last() -> None:
    waiting = Waiting("queue", (10, 20))
    assert waiting.committed(10)[0].steps == (20, 10)
    assert Waiting("skip", (10,)).committed(10) == (Waiting("skip", (10,)), ())


def test_what_a_restart_made_void_is_left_out() -> None:
    assert Waiting("queue", (10, 20, 30)).void_after(15) == (Waiting("queue", (10,)), (20, 30))


@given(st.sampled_from(["skip", "queue"]), ACTS)
def test_every_checkpoint_is_judged_or_left_out_or_waits(when_behind, acts) -> None:
    """Each commit ends in exactly one of the three, and a queue leaves none out but void ones."""
    waiting, open_steps = Waiting(when_behind), set()
    for act in acts:
        if act == "next":
            waiting, step = waiting.next()
            assert (step is None) == (not open_steps)
            open_steps.discard(step)
            continue
        what, step = act
        waiting, left_out = waiting.committed(step) if what == "committed" else waiting.void_after(step)
        if what == "committed":
            open_steps.add(step)
            assert when_behind == "skip" or not left_out
        else:
            assert all(each > step for each in left_out)
        assert set(left_out) <= open_steps and len(left_out) == len(set(left_out))
        open_steps -= set(left_out)
        assert set(waiting.steps) == open_steps and len(waiting.steps) == len(open_steps)
