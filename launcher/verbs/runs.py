"""Runs seen from another terminal: how one is, what its ranks have written, asking it to stop, going on with it."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.history.foresight import Comparison
from launcher.history.history import RunHistory
from launcher.history.values import Facts, mfu
from launcher.history.view import view_of
from launcher.report.display import Display
from launcher.verbs import stages
from trainer.config import UserError
from trainer.events import KINDS, Event, EventReader, read_events
from trainer.metrics import STATISTICS
from trainer.run_dir import RunDir

_POLL_SECONDS = 0.2
_ENDS = ("run_finished", "preempted", "failed", "diverged")
_RECENT_EVENTS = 5


@dataclass(frozen=True)
class Status:
    """Of a run, by its record."""

    state: str
    """ "working", or how the last command ended: finished, preempted, failed, diverged, cut off."""
    detail: str | None
    """What it is doing, or why it ended."""
    step: int
    """Of the surviving history."""
    num_steps: int
    loss: float | None
    step_seconds: float | None
    """Of the last step."""
    lives: int
    """Times that ranks were started."""
    failures: int
    last_failure: str | None
    saved_step: int | None
    goodput: float | None
    """Productive share of the time for which commands have trained the run."""
    times: dict[str, float]
    """That time (s), by what came of it; see `launcher.history.times`."""
    remaining_seconds: float | None
    """Until the last step, at the pace of the last ones."""
    tokens_per_second: float | None
    mfu: float | None
    plan: Comparison | None
    """Step time, speed, MFU and memory, planned and measured, if a plan was made."""
    heldout_loss: float | None
    rank_seconds: dict[str, float] | None
    """In which ranks work in a step: min, mean, max, and the number of the slowest."""
    saves: str
    restarts: dict[str, int]
    """By what had ended the ranks before."""
    page: str | None
    """Address of the page, while a command serves it."""
    recent: list[dict[str, Any]]
    """The last events that a person should know of, oldest first."""


def open_run(path: Path) -> RunDir:
    """Raises:
    UserError: it is no run.
    """
    run_dir = RunDir(path)
    if not run_dir.config_path.is_file():
        raise UserError(f"{path} holds no config.yaml of a run; give the folder of one, like runs/NAME")
    return run_dir


class Observer:
    """Looks at a run's folder again and again; what it has read of the record it need not read again."""

    def __init__(self, path: Path) -> None:
        """Raises:
        UserError: it is no run.
        """
        self._run_dir = open_run(path)
        self._facts = Facts.of(self._run_dir.config())
        self._history, self._events = RunHistory(), EventReader(self._run_dir.events_path)

    def status(self) -> Status:
        """As of now."""
        history, facts = self._history, self._facts
        for event in self._events.new_events():
            history.add(event)
        state, detail = state_of(self._run_dir, history)
        now = time.time() if state == "working" else 0.0  # without a command no time passes
        seen = view_of(history, facts, now)
        saved, evaluation = history.saves.newest, history.last_evaluation
        rate = history.tokens_per_second(facts.seq_length, history.recent) if len(history.steps) else None
        ranks = history.ranks[-1] if history.ranks else None
        return Status(
            state=state,
            detail=detail,
            step=history.step,
            num_steps=facts.schedule.num_steps,
            loss=history.loss,
            step_seconds=history.steps["seconds"][-1] if len(history.steps) else None,
            lives=history.num_lives,
            failures=len(history.failures),
            last_failure=history.failures[-1]["error"] if history.failures else None,
            saved_step=saved["step"] if saved else None,
            goodput=seen["goodput"],
            times=seen["times"],
            remaining_seconds=seen["remaining_seconds"],
            tokens_per_second=rate,
            mfu=mfu(history, facts, rate) if rate is not None else None,
            plan=seen["plan"],
            heldout_loss=evaluation["loss"] if evaluation else None,
            rank_seconds={name: ranks[name] for name in (*STATISTICS, "slowest")} if ranks else None,
            saves=str(history.saves),
            restarts=dict(history.restarts),
            page=_page(self._run_dir),
            recent=seen["marks"][-_RECENT_EVENTS:],
        )


def status(path: Path) -> Status:
    """Raises:
    UserError: it is no run.
    """
    return Observer(path).status()


def _page(run_dir: RunDir) -> str | None:
    try:
        return run_dir.page_url_path.read_text(encoding="utf-8") if is_worked_on(run_dir) else None
    except OSError:
        return None


def events(path: Path, since: float | None, kinds: Sequence[str]) -> Iterator[Event]:
    """Of a run's record: those of some kinds, all unless some are named, from a time on (Unix seconds).

    Raises:
        UserError: it is no run, or there are no such kinds.
    """
    run_dir = open_run(path)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"--kind {unknown[0]}: there is no such kind of event; known: {', '.join(KINDS)}")
    for event in read_events(run_dir.events_path):
        if (not kinds or event["kind"] in kinds) and (since is None or event.get("time", 0.0) >= since):
            yield event


def state_of(run_dir: RunDir, history: RunHistory) -> tuple[str, str | None]:
    """State and detail of a `Status`."""
    end = history.end
    if is_worked_on(run_dir):
        return "working", history.stage or "starting"
    match end:
        case None:
            return "not begun", None
        case {"kind": "run_finished"}:
            return "finished", None
        case {"kind": "stage_finished"}:
            return "finished", end["stage"]
        case {"kind": "stage_started"}:
            return "cut off", f"in {end['stage']}; the same command goes on"
    return str(end["kind"]), end.get("reason") or end.get("error") or end.get("verdict")


def is_worked_on(run_dir: RunDir) -> bool:
    """Whether a command of this machine has the run, by the kernel's list of locks: to try the lock would be to take it
    for a moment, and to turn away a command that starts in it."""
    try:
        inode = os.stat(run_dir.lock_path).st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    return any(line.split()[1] == "FLOCK" and line.split()[5].endswith(f":{inode}") for line in locks.splitlines())


def stop(path: Path, timeout_seconds: float | None) -> str:
    """Ask the run's ranks to save and end, and wait for it; returns one line of how it ended.

    Raises:
        UserError: nothing works on the run, or not in a stage that can be asked, or it has not ended in time.
    """
    run_dir = open_run(path)
    if not is_worked_on(run_dir):
        raise UserError(f"no command of this machine works on {path}; `broadgauge status {path}` says how it ended")
    events = EventReader(run_dir.events_path)
    events.skip_to_end()
    run_dir.stop_path.write_text("`broadgauge stop`", encoding="utf-8")
    deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
    ended: list[Event] = []
    while is_worked_on(run_dir):
        ended += [event for event in events.new_events() if event["kind"] in _ENDS]
        if deadline is not None and time.monotonic() > deadline:
            raise UserError(f"{path} has not ended within {timeout_seconds:g} s; it has been asked, and may yet")
        time.sleep(_POLL_SECONDS)
    ended += [event for event in events.new_events() if event["kind"] in _ENDS]
    told = next((event for event in ended if "saved_step" in event), None)
    if told is not None:
        return f"stopped after step {told['step']}, saved at step {told['saved_step']}"
    now = status(path)
    return now.state + (f": {now.detail}" if now.detail else "")


def resume(path: Path, display: Display, ray: str | None, *, force: bool = False) -> None:
    """Go on with what the last command did: the whole run, or its training."""
    run_dir = open_run(path)
    config = run_dir.config()
    is_whole = any(event["kind"] == "run_started" for event in read_events(run_dir.events_path))
    if is_whole or not config.data.prepared:
        stages.run(config, run_dir, display, ray, force=force)
        return
    stages.train_alone(config, run_dir, display, ray, force=force)


# ---------------------------------------------------------------------------------------------------------------- logs


def first_error(run_dir: RunDir) -> list[str]:
    """What the first rank to fail wrote in the last life that failed, from its last traceback on."""
    failed = [event for event in read_events(run_dir.events_path) if event["kind"] in ("life_failed", "failed")]
    if not failed:
        return []
    told = next((event for event in reversed(failed) if event.get("log")), None)
    log = Path(told["log"]) if told is not None else None
    lines = log.read_text(errors="replace").splitlines() if log is not None and log.is_file() else []
    begins = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    return [(told or failed[-1])["error"], *(lines[begins[-1] :] if begins else lines[-20:])]


@contextmanager
def following(run_dir: RunDir, ranks: Sequence[int], num_lines: int) -> Iterator["Follower"]:
    """The logs of ranks, all unless some are named."""
    numbers = ranks or sorted(int(path.stem.removeprefix("rank-")) for path in run_dir.logs.glob("rank-*.log"))
    paths = {number: run_dir.logs / f"rank-{number}.log" for number in numbers}
    missing = [number for number, path in paths.items() if not path.is_file()]
    if missing or not paths:
        raise UserError(
            f"{run_dir.logs} has no log of rank {missing[0] if missing else 0}; ranks write when they start"
        )
    handles: dict[int, Any] = {number: open(path, errors="replace") for number, path in paths.items()}  # noqa: SIM115
    try:
        yield Follower(handles, num_lines)
    finally:
        for handle in handles.values():
            handle.close()


class Follower:
    """Lines of several growing files."""

    def __init__(self, handles: dict[int, Any], num_lines: int) -> None:
        self._handles, self._num_lines = handles, num_lines

    def last(self) -> Iterator[str]:
        """The end of each."""
        for rank, handle in self._handles.items():
            for line in handle.read().splitlines()[-self._num_lines :]:
                yield f"rank {rank} | {line}"

    def new(self) -> Iterator[str]:
        """What was written since, whole lines."""
        for rank, handle in self._handles.items():
            while True:
                place = handle.tell()
                line = handle.readline()
                if not line.endswith("\n"):
                    handle.seek(place)
                    break
                yield f"rank {rank} | {line.rstrip()}"
