"""Who is asked to end, until when, and what a signal does outside of training."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from launcher.job.preemption import Preemption, late, listening, stopped, unwrapped
from made_checkpoints import write_checkpoint
from trainer.events import EventLog, read_events
from trainer.run_dir import RunDir
from trainer.stop import Preempted

GRACE_SECONDS = 60.0


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def preemption(tmp_path: Path, clock: Clock) -> Preemption:
    return Preemption(RunDir(tmp_path), GRACE_SECONDS, clock)


def test_a_signal_is_a_request_while_ranks_train(preemption: Preemption) -> None:
    with preemption.of_training():
        for _ in range(2):
            preemption.hear()
        assert preemption.reason == "SIGTERM" and not preemption.is_interrupted


def test_ctrl_c_is_a_request_once_and_the_end_twice(preemption: Preemption) -> None:
    with preemption.of_training():
        preemption.hear_interrupt()
        assert preemption.reason == "Ctrl-C" and preemption.is_interrupted
        with pytest.raises(KeyboardInterrupt):
            preemption.hear_interrupt()


def test_ctrl_c_after_sigterm_does_not_end_all_at_once(preemption: Preemption) -> None:
    with preemption.of_training():
        preemption.hear()
        preemption.hear_interrupt()
        assert preemption.reason == "SIGTERM"


def test_outside_of_training_ctrl_c_is_what_it_always_was(preemption: Preemption) -> None:
    with pytest.raises(KeyboardInterrupt):
        preemption.hear_interrupt()
    preemption.is_over = True
    preemption.hear_interrupt()


def test_ranks_are_asked_and_given_the_grace_period(preemption: Preemption, clock: Clock, tmp_path: Path) -> None:
    with preemption.of_training():
        preemption.ask_ranks("SIGTERM")
        assert (tmp_path / "stop").read_text() == "SIGTERM"
        clock.seconds += GRACE_SECONDS - 1
        preemption.ask_ranks("another reason")  # does not begin it anew
        assert not preemption.is_late()
        clock.seconds += 2
        assert preemption.is_late()
        preemption.forget()
        assert not preemption.is_late() and not (tmp_path / "stop").exists()


@pytest.mark.parametrize(("seconds", "allowed"), [(5.0, 5.0), (600.0, GRACE_SECONDS), (None, GRACE_SECONDS)])
def test_a_notice_may_leave_less_than_the_grace_period(
    seconds: float | None, allowed: float, preemption: Preemption, clock: Clock
) -> None:
    preemption.ask_ranks("the node goes", seconds)
    clock.seconds += allowed
    assert not preemption.is_late()
    clock.seconds += 0.1
    assert preemption.is_late()


def test_nobody_who_was_not_asked_is_late(preemption: Preemption, clock: Clock) -> None:
    clock.seconds += 1e9
    assert not preemption.is_late()


def test_a_request_to_an_earlier_life_is_void(preemption: Preemption, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    preemption.begin()
    with preemption.of_training():
        preemption.look_for_file()
        assert not (tmp_path / "stop").exists() and preemption.reason is None


def test_a_request_before_training_is_heard_when_it_begins(preemption: Preemption, tmp_path: Path) -> None:
    """As `broadgauge stop` makes it while data is prepared or Ray starts."""
    preemption.begin()
    (tmp_path / "stop").write_text("`broadgauge stop`")
    with preemption.of_training():
        preemption.look_for_file()
        assert preemption.reason == "`broadgauge stop`"
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize("asked_first", [False, True])
def test_what_somebody_else_asks_while_ranks_save_to_be_moved_stays_asked(
    preemption: Preemption, tmp_path: Path, asked_first: bool
) -> None:
    with preemption.of_training():
        if asked_first:
            (tmp_path / "stop").write_text("`broadgauge stop`")
        preemption.ask_ranks("a node is to be drained")
        if not asked_first:
            (tmp_path / "stop").write_text("`broadgauge stop`")
        preemption.forget()
        preemption.look_for_file()
        assert preemption.reason == "`broadgauge stop`"


def test_a_save_that_did_not_come_about_is_not_claimed(tmp_path: Path) -> None:
    told = {"kind": "preempted", "step": 7, "saved_step": 7}
    assert stopped(told, tmp_path).startswith("stopped after step 7, but its checkpoint could not be written")
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "manifest.json").touch()
    assert stopped(told, tmp_path).startswith("stopped after step 7, saved at step 7; ")


def test_outside_of_training_the_first_signal_ends_the_command_and_the_next_do_not_disturb_its_end(
    preemption: Preemption, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with listening(preemption):
        with pytest.raises(Preempted, match="SIGTERM; the same command goes on"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "stop").exists()


def test_nothing_is_raised_while_a_command_that_has_ended_cleans_up(preemption: Preemption) -> None:
    preemption.is_over = True
    preemption.hear()


def test_nothing_on_the_way_swallows_it(preemption: Preemption) -> None:
    with pytest.raises(Preempted):
        try:
            preemption.hear()
        except Exception:
            pytest.fail("swallowed")


def test_a_disk_that_takes_no_file_does_not_make_a_failure_of_it(clock: Clock, tmp_path: Path) -> None:
    """The ranks cannot be asked, and are killed in time."""
    preemption = Preemption(RunDir(tmp_path / "gone"), GRACE_SECONDS, clock)
    preemption.ask_ranks("SIGTERM")
    clock.seconds += GRACE_SECONDS + 1
    assert preemption.is_late()


@pytest.mark.parametrize(
    ("ended", "saved", "words"),
    [
        (False, True, "the ranks did not end in time"),
        (True, False, "stopped after step 7, but its checkpoint was not on disk"),
        (True, True, "stopped after step 7, saved at step 6 here and not yet uploaded"),
    ],
)
def test_what_was_still_to_be_done_is_told_apart(ended: bool, saved: bool, words: str, tmp_path: Path) -> None:
    """The request of an earlier life, or one that no rank heard of, says nothing about this one."""
    log = EventLog(tmp_path / "events.jsonl")
    log.write("preempted", reason="SIGTERM", step=5, saved_step=5)
    log.write("training_started", step=5)
    log.write("preempted", reason="SIGTERM, in another stage")
    if ended:
        log.write("preempted", reason="SIGTERM", step=7, saved_step=6)
    if saved:
        write_checkpoint(tmp_path / "checkpoints", 6, {"master/weight": np.zeros((2, 2), np.float32)}, files=1)
    assert late(read_events(tmp_path / "events.jsonl"), tmp_path / "checkpoints", GRACE_SECONDS).startswith(words)


@pytest.mark.parametrize("cause", [Preempted("SIGTERM"), KeyboardInterrupt()])
def test_what_compiled_code_wraps_comes_out_as_itself(cause: BaseException) -> None:
    with pytest.raises(type(cause)) as found, unwrapped():
        raise SystemError("wait returned a result with an exception set") from cause
    assert found.value is cause
    with pytest.raises(SystemError, match="another"), unwrapped():
        raise SystemError("another") from ValueError()
