"""Asking the ranks of a run that trains for a profile of some steps."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.history.history import RunHistory
from launcher.verbs.runs import is_worked_on, open_run
from trainer.config import UserError
from trainer.events import EventReader
from trainer.profiling import ProfileRequest

_POLL_SECONDS = 0.2
_WRITING_SECONDS = 60.0  # for the other ranks to have written theirs, after rank 0 has


def profile(path: Path, steps: str, ranks: Sequence[int]) -> list[Path]:
    """Have ranks record the steps `FIRST:LAST`, and wait for their traces.

    Raises:
        UserError: it cannot be, or has not come about.
    """
    run_dir = open_run(path)
    if not is_worked_on(run_dir):
        raise UserError(f"no command of this machine works on {path}; `broadgauge resume {path}` goes on with it")
    num_ranks = run_dir.config().parallel.num_ranks
    if wrong := [rank for rank in ranks if not 0 <= rank < num_ranks]:
        raise UserError(f"--rank {wrong[0]}: the run has ranks 0 to {num_ranks - 1}")
    events, history = EventReader(run_dir.events_path), RunHistory()
    for event in events.new_events():
        history.add(event)
    request = ProfileRequest(*_parsed(steps, history.step), tuple(sorted(set(ranks))))
    wanted = run_dir.profile_request_path
    if wanted.exists():
        raise UserError(f"another profile of {path} is under way; wait for it, or remove {wanted}")
    request.write(wanted)
    try:
        while is_worked_on(run_dir):
            for event in events.new_events():
                if event["kind"] == "profiled":
                    if event["problem"]:
                        raise UserError(f"there is no profile: {event['problem']}")
                    return _written([request.trace(run_dir, rank) for rank in request.ranks])
            time.sleep(_POLL_SECONDS)
    finally:
        wanted.unlink(missing_ok=True)
    raise UserError(f"the command that worked on {path} has ended before step {request.last_step}")


def _parsed(steps: str, done: int) -> tuple[int, int]:
    """First and last step.

    Raises:
        UserError: they are none, or have passed.
    """
    found = re.fullmatch(r"(\d+):(\d+)", steps)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--steps {steps} is no range; give the first step and the last, like {done + 10}:{done + 12}")
    first, last = int(found[1]), int(found[2])
    if first <= done + 1:
        raise UserError(f"--steps {steps}: step {done} is done and the next one begins; begin with {done + 3} or later")
    return first, last


def _written(paths: list[Path]) -> list[Path]:
    deadline = time.monotonic() + _WRITING_SECONDS
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise UserError(f"{missing[0]} has not been written within {_WRITING_SECONDS:g} s; see the rank's log")
        time.sleep(_POLL_SECONDS)
    return paths
