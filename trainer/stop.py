"""A request to save and end: SIGTERM to a rank, or a file that the launcher writes into the run's folder."""

import signal
from pathlib import Path


class Preempted(BaseException):
    """The run was asked to end before its end, and did; the text is one line for a person.

    No `Exception`, as KeyboardInterrupt is none: a signal may raise it anywhere, and nothing on the way may swallow it.
    """


class Interrupted(Preempted):
    """The same, by the person at the terminal."""


class StopRequest:
    """Whether this rank has heard of one; what it hears the others learn after the step."""

    def __init__(self, path: Path | None) -> None:
        """`path` is the launcher's file, on the rank that looks at it."""
        self._path = path
        self._signalled = False

    def listen(self) -> None:
        """From now on SIGTERM is a request, not the end."""
        signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_: object) -> None:
        self._signalled = True

    def is_made(self) -> bool:
        return self._signalled or (self._path is not None and self._path.exists())

    def reason(self) -> str:
        """Why, as far as this rank knows."""
        if self._path is not None and self._path.exists():
            return self._path.read_text(encoding="utf-8").strip() or f"the file {self._path}"
        return "SIGTERM to a rank"
