"""A worker process: runs one task after another that its parent sends, and ends with its parent.

Started by `data_pipeline.workers` as `python -m data_pipeline.worker FD`, with one end of a socket. A plain process
of its own, and no fork of the parent: encoders start threads, which a fork would lose.
"""

import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

from data_pipeline.tasks import Advance, Done, Failed, Task, describe_failure

_PR_SET_PDEATHSIG = 1
_REPORT_SECONDS = 0.2
_NEEDED_BY_TASKS = ("data_pipeline.cleaning", "data_pipeline.finishing", "data_pipeline.joining")


class _Reporter:
    """Sends a task's progress now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._next = time.monotonic() + _REPORT_SECONDS
        self.last = Advance()

    def __call__(self, advance: Advance) -> None:
        self.last = advance
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _REPORT_SECONDS
            self._connection.send(advance)


def serve(connection: Connection) -> None:
    """Run tasks until the parent closes its end."""
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        report = _Reporter(connection)
        try:
            result = task.run(report)
            answer: Done | Failed = Done(result, report.last)
        except BaseException as error:  # a panic of Rust is no `Exception`
            answer = describe_failure(error, traceback.format_exc())
        connection.send(answer)


def main() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for name in _NEEDED_BY_TASKS:  # while the driver still plans
        importlib.import_module(name)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
