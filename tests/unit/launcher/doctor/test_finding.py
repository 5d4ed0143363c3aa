"""Findings and their verdict together; checks that hang or raise."""

import threading
import time

import pytest

from launcher.doctor.finding import Finding, fail, ok, refused, skipped, warn, worst
from launcher.doctor.guard import Check, outcome
from trainer.config import UserError


def test_the_worst_finding_counts_and_what_was_skipped_does_not() -> None:
    findings = [ok("a", "fine"), skipped("b", "nothing there")]
    assert worst(findings) == "ok"
    assert worst([*findings, warn("c", "slow", "be fast")]) == "warn"
    assert worst([fail("d", "broken", "mend it"), *findings, warn("c", "slow", "be fast")]) == "fail"


def test_an_error_for_users_is_split_into_what_was_found_and_the_fix() -> None:
    error = UserError("x is 3; y is 4; use 5")
    assert refused("disk", error) == Finding("disk", "fail", "x is 3; y is 4", "use 5")
    assert refused("disk", UserError("no way")) == Finding("disk", "fail", "no way", "")


def raising(error: BaseException) -> Check:
    def find() -> Finding:
        raise error

    return Check("disk", 10.0, find, "look at it", about="/a")


@pytest.mark.parametrize(
    ("error", "measured"),
    [
        (RuntimeError("two\nlines"), "/a: RuntimeError: two lines"),
        (SystemExit(), "/a: SystemExit"),
        (KeyError("Contents"), "/a: KeyError: 'Contents'"),
    ],
)
def test_whatever_a_check_raises_is_one_line(error: BaseException, measured: str) -> None:
    assert outcome(raising(error)) == fail("disk", measured, "look at it")


def test_what_a_check_refuses_carries_its_own_fix() -> None:
    assert outcome(raising(UserError("full; make room"))) == fail("disk", "full", "make room")


def test_a_check_that_hangs_fails_in_its_time() -> None:
    released = threading.Event()

    def find() -> Finding:
        released.wait()
        return ok("disk", "too late")

    began = time.monotonic()
    found = outcome(Check("disk", 0.05, find, "mount it again", about="/mnt/dead"))
    released.set()
    assert found == fail("disk", "/mnt/dead: no answer in 0.05 s", "mount it again")
    assert time.monotonic() - began < 5.0
