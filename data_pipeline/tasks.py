"""What travels between the driver and its workers: small tasks one way, progress and results the other.

Text and tokens never do: a task names a split of the sources, and its result lies on disk.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.section import UserError


@dataclass(frozen=True)
class Advance:
    """How far a task has come."""

    input_bytes: int = 0
    documents: int = 0
    tokens: int = 0

    def __add__(self, other: "Advance") -> "Advance":
        return Advance(
            self.input_bytes + other.input_bytes, self.documents + other.documents, self.tokens + other.tokens
        )


Report = Callable[[Advance], None]


class Task(Protocol):
    """Picklable; running it again, after a failure half-way, is safe."""

    @property
    def name(self) -> str:
        """What it works on, for a person."""

    def run(self, report: Report) -> Any:
        """Do it. `report` takes what has been done so far, in all."""


@dataclass(frozen=True)
class Done:
    result: Any
    advance: Advance
    """All that the task came through."""


@dataclass(frozen=True)
class Failed:
    reason: str
    """One line."""
    is_final: bool = False
    """Trying again, or going on without it, makes no sense: the whole run ends."""
    details: str = ""


Outcome = Done | Failed


class Workers(Protocol):
    """Runs tasks in other processes."""

    def run(self, tasks: Sequence[Task], on_advance: Report) -> list[Outcome]:
        """The outcome of every task, in their order. `on_advance` hears the sum over all tasks so far.

        A task whose worker dies or that raises is tried again, up to `MAX_TRIES` times; a final failure ends the rest.

        Raises:
            UserError: a task failed for a reason that the user can mend, such as a full disk.
        """


MAX_TRIES = 3
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_WRITING = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def without_room(out: Path) -> Iterator[None]:
    """What is written to `out` in here may not fit, or not be allowed.

    Raises:
        UserError: it is so.
    """
    try:
        yield
    except OSError as error:
        reason = _why_not_written(error, str(out))
        if reason is None:
            raise
        raise UserError(reason) from error


def describe_failure(error: BaseException, details: str) -> Failed:
    """What to make of an exception of a task. An OSError is of writing: those of reading have become others."""
    if isinstance(error, UserError):
        return Failed(str(error), is_final=True)
    reason = _why_not_written(error, "the prepared data") if isinstance(error, OSError) else None
    if reason is not None:
        return Failed(reason, is_final=True)
    return Failed(f"{type(error).__name__}: {' '.join(str(error).split())}", details=details)


def _why_not_written(error: OSError, what: str) -> str | None:
    """One line for the user, if they can mend it."""
    if error.errno in _NO_ROOM:
        fix = "make room and run again to go on"
    elif error.errno in _NO_WRITING:
        fix = "allow it and run again to go on, or use another folder"
    else:
        return None
    return f"{error.filename or what} cannot be written ({error.strerror}); {fix}"
