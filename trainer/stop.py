"""A request to save and end: SIGTERM to a rank, or a file that the launcher writes into the run's folder."""

import signal
from pathlib import Path


class Preempted(Exception):
    """The run was asked to end before its end, and did; the text is one line for a person."""


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
