"""What the ranks of this machine are doing: their last sign of life, the state of their processes, where they are.

A rank is asked for its stack by a signal whose handler runs in C, so one that waits in C for others answers too; one
that is stopped, or whom the kernel keeps waiting (a disk, a network mount), does not. System calls that
the signal interrupts are taken up again; `trainer.heartbeat.Ask` says what is left of a risk.
"""

import ctypes
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.heartbeat import Ask, Beat, beat_path, process_stat, read, stack_path

ProcessState = Literal["running", "stopped", "zombie", "gone", "unknown"]

_POLL_SECONDS = 0.005
_PATIENCE_SECONDS = 0.05
_STATES: dict[str, ProcessState] = {"T": "stopped", "t": "stopped", "Z": "zombie", "X": "zombie"}
_PROBLEMS = {"stopped": "is stopped", "zombie": "has ended", "gone": "is gone"}
_HEADER = re.compile(r"(?:Stack|(?:Current thread|Thread) 0x([0-9a-f]+).*) \(most recent call first\):")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?+) in (.*)')
_OUTERMOST = "<module>"
_CUT = "  ..."  # what ends a stack of more than 100 frames
_COMMUNICATION = ("torch/distributed/distributed_c10d.py", "megatron/core/pipeline_parallel/p2p_communication.py")
_OUR_WAITS = {
    ("trainer/parallel.py", "timed_wait"): "wait",  # a receive, or a collective that was begun earlier
    # on GPUs, where collectives return at once, the host waits for what comes out of them
    ("trainer/parallel.py", "sum_over_ranks"): "sum_over_ranks",
    ("trainer/pipeline.py", "sum_over_replicas"): "sum_over_replicas",
}
_NO_COLLECTIVE = ("_", "<", "get_", "is_")  # how names of what else is in those files begin


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    """Zero where Python does not know."""
    function: str


@dataclass(frozen=True)
class RankReport:
    """What could be learnt of one rank."""

    rank: int
    beat: Beat | None = None
    """None if the rank has said nothing yet."""
    process: ProcessState = "unknown"
    stack: tuple[Frame, ...] | None = None
    """Of the main thread, innermost first."""
    problem: str | None = None
    """Why there is no stack, to follow "rank 3 "."""

    @property
    def collective(self) -> str | None:
        """The function in which the rank waits for others: all_reduce, barrier, recv_forward."""
        for frame in self.stack or ():
            if frame.file.endswith(_COMMUNICATION) and not frame.function.startswith(_NO_COLLECTIVE):
                return frame.function
        if not self.stack:
            return None
        innermost = self.stack[0]
        ours = _OUR_WAITS.items()
        return next((n for (file, f), n in ours if innermost.file.endswith(file) and innermost.function == f), None)


def collect(
    folder: Path, ranks: Iterable[int], timeout_seconds: float, *, all_threads: bool = False
) -> list[RankReport]:
    """Ask ranks of this machine for their stacks, and wait for the answers for no longer than this.

    Args:
        folder: `RankSpec.heartbeats`, where the answers stay as files that a person may read.
        all_threads: have the files tell of the other threads too. That may kill a rank that is at work, see `Ask`.
    """
    deadline = time.monotonic() + timeout_seconds
    ask = Ask.ALL_THREADS if all_threads else Ask.MAIN_THREAD
    reports = [_ask(folder, rank, ask) for rank in ranks]
    while True:
        reports = [_hear(folder, report) for report in reports]
        waiting = [report for report in reports if _may_answer(report)]
        if not waiting or time.monotonic() > deadline:
            return [_give_up(report, timeout_seconds) for report in reports]
        time.sleep(_POLL_SECONDS)


def _ask(folder: Path, rank: int, ask: Ask) -> RankReport:
    beat = read(beat_path(folder, rank))
    if beat is None:
        return RankReport(rank, problem="has given no sign of life")
    state = _state_of(beat)
    if state != "running":
        return RankReport(rank, beat, state, problem=_PROBLEMS.get(state))
    if not _catches(beat.pid, ask):  # it would die of it
        return RankReport(rank, beat, state, problem="does not tell its stacks")
    try:
        os.truncate(stack_path(folder, rank), 0)
        _let_it_fall_asleep(beat.pid)
        _signal_main_thread(beat.pid, ask)
    except OSError as error:
        return RankReport(rank, beat, state, problem=f"cannot be asked: {error}")
    return RankReport(rank, beat, state)


def _hear(folder: Path, report: RankReport) -> RankReport:
    if not _may_answer(report) or report.beat is None:
        return report
    try:
        dump = stack_path(folder, report.rank).read_text(errors="replace")
    except OSError:
        dump = ""
    stack = parse(dump, report.beat.main_thread)
    if stack is not None:
        return RankReport(report.rank, report.beat, report.process, stack)
    state = _state_of(report.beat)  # it may have ended, or been stopped, meanwhile
    return RankReport(report.rank, report.beat, state, problem=_PROBLEMS.get(state))


def _may_answer(report: RankReport) -> bool:
    return report.stack is None and report.problem is None


def _give_up(report: RankReport, timeout_seconds: float) -> RankReport:
    if not _may_answer(report):
        return report
    problem = f"does not answer within {timeout_seconds:g} s"
    return RankReport(report.rank, report.beat, report.process, problem=problem)


def parse(dump: str, thread: int) -> tuple[Frame, ...] | None:
    """The frames of a thread, innermost first, of what `faulthandler` printed; None if it has not printed all yet.

    A stack without the name of its thread is taken for this one's. Where it was printed several times, the last
    counts. A thread that is just being started has the name of the one that
    starts it, and no frames.
    """
    found: tuple[Frame, ...] | None = None
    frames: list[Frame] = []
    is_wanted = False
    for line in dump.splitlines():
        if header := _HEADER.fullmatch(line):
            frames, is_wanted = [], header[1] is None or int(header[1], 16) == thread
        elif is_wanted and (frame := _FRAME.fullmatch(line)):
            frames.append(Frame(frame[1], int(frame[2]) if frame[2].isdigit() else 0, frame[3]))
            found = tuple(frames) if frame[3] == _OUTERMOST else found
        elif is_wanted and line == _CUT:
            found = tuple(frames)
    return found


# -------------------------------------------------------------------------------------------------------- the processes


def _state_of(beat: Beat) -> ProcessState:
    try:
        stat = process_stat(beat.pid)
    except OSError:
        return "gone"
    return _STATES.get(stat.state, "running") if stat.start_ticks == beat.start_ticks else "gone"


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _let_it_fall_asleep(pid: int) -> None:
    """Whoever waits in the kernel is not in the middle of changing what the handler reads."""
    patience = time.monotonic() + _PATIENCE_SECONDS
    while process_stat(pid).state == "R" and time.monotonic() < patience:
        time.sleep(_PATIENCE_SECONDS / 50)


def _signal_main_thread(pid: int, number: int) -> None:
    """Not the process: while its main thread starts another, it takes no signals, and one of gloo's would get it."""
    if ctypes.CDLL(None, use_errno=True).tgkill(pid, pid, number) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
