"""Checks that cannot hold the doctor up: each has its time, and whatever goes wrong with it is a finding."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from launcher.doctor.finding import Finding, fail, refused
from trainer.config import UserError


@dataclass(frozen=True)
class Check:
    name: str
    seconds: float
    """In which it has to come to a finding."""
    find: Callable[[], Finding]
    if_silent: str
    """What to do where it comes to none, like a file system that never answers."""
    about: str = ""
    """What is examined, where a check has several such."""


def outcome(check: Check) -> Finding:
    """What a check finds; `fail` where it raises, or takes too long.

    It runs in a thread of its own, which cannot be ended: one that hangs stays until the process ends, which it does
    not hold up.
    """
    found, about = Future[Finding](), f"{check.about}: " if check.about else ""

    def run() -> None:
        try:
            found.set_result(check.find())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name=check.name, daemon=True).start()
    try:
        error = found.exception(check.seconds)
    except TimeoutError:
        return fail(check.name, f"{about}no answer in {check.seconds:g} s", check.if_silent)
    if error is None:
        return found.result()
    if isinstance(error, UserError):
        return refused(check.name, error)
    reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return fail(check.name, f"{about}{reason}", check.if_silent)
