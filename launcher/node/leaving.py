"""A machine that is to go away: ask the run that works on it to save and end, and wait until it has.

    python -m launcher.node.leaving RUN_DIR SECONDS

A pod's preStop hook runs this, while everything in the pod still lives. It returns at once where nothing of the run is
at work, as after its end.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.run_dir import RunDir

_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Process:
    pid: int
    arguments: Sequence[str]


def leave(run_dir: RunDir, seconds: float, find: Callable[[], Sequence[Process]]) -> bool:
    """Ask whatever of the run is at work here, once; returns whether it has ended within `seconds`."""
    deadline = time.monotonic() + seconds
    here = _of_run(run_dir, find())
    for process in here:
        if _is_driver(process):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
    if here and run_dir.path.is_dir():
        run_dir.stop_path.touch()  # for the driver, which may be on another machine
    while here and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        here = _of_run(run_dir, find())
    return not here


def processes() -> list[Process]:
    """Those that this user may look at."""
    return list(_processes())


def _processes() -> Iterator[Process]:
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # gone by now
            arguments = Path("/proc", name, "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            yield Process(int(name), [argument.decode(errors="replace") for argument in arguments])


def _of_run(run_dir: RunDir, found: Sequence[Process]) -> list[Process]:
    """Its driver, and fork servers and ranks, whose arguments name the folder of its logs."""
    return [process for process in found if _is_driver_of(process, run_dir) or _is_rank_of(process, run_dir)]


def _is_driver(process: Process) -> bool:
    names = [os.path.basename(argument) for argument in process.arguments]
    return any(pair in {("broadgauge", "run"), ("broadgauge", "train")} for pair in pairwise(names))


def _is_driver_of(process: Process, run_dir: RunDir) -> bool:
    return _is_driver(process) and any(Path(each).resolve() == run_dir.path.resolve() for each in process.arguments)


def _is_rank_of(process: Process, run_dir: RunDir) -> bool:
    return any("launcher.node.fork_server" in argument for argument in process.arguments) and any(
        f'"{run_dir.logs.resolve()}"' in argument for argument in process.arguments
    )


if __name__ == "__main__":
    folder, wait_seconds = RunDir(Path(sys.argv[1])), float(sys.argv[2])
    sys.exit(0 if leave(folder, wait_seconds, processes) else 1)
