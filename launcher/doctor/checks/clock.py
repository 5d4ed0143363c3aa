"""Clocks of machines: how far each is from the one on which the doctor runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from launcher.doctor.finding import Finding, fail, ok, warn

NAME = "clock"
NUM_QUESTIONS = 9
_WARN_SECONDS = 0.5  # ntpd and chrony stay within 0.13 s or step: beyond this neither is at work
_FAIL_SECONDS = 5.0  # stacks and events of several machines are put in order by their times
_FIX = "have chrony or ntpd set its clock"


@dataclass(frozen=True)
class Clock:
    ahead_seconds: float
    uncertain_seconds: float
    """Half of the way there and back: the most that the estimate can be off."""


def measure(ask: Callable[[], float], clock: Callable[[], float] = time.time) -> Clock:
    """Of the machine that `ask` asks for its time; the quickest of some answers counts (Cristian 1989)."""
    answers = []
    for _ in range(NUM_QUESTIONS):
        before = clock()
        there = ask()
        after = clock()
        answers.append(Clock(there - (before + after) / 2, (after - before) / 2))
    return min(answers, key=lambda each: each.uncertain_seconds)


def judge(found: Clock) -> Finding:
    """By the least that it is off for certain."""
    side = "ahead of" if found.ahead_seconds >= 0 else "behind"
    apart, uncertain = abs(found.ahead_seconds), found.uncertain_seconds
    off = max(0.0, apart - uncertain)
    measured = f"{apart * 1e3:,.2f} ms {side} this machine's, within {uncertain * 1e3:,.2f} ms"
    if off > _FAIL_SECONDS:
        return fail(NAME, f"{measured}; more than 5 s", _FIX)
    return warn(NAME, f"{measured}; more than 0.5 s", _FIX) if off > _WARN_SECONDS else ok(NAME, measured)
