"""One rank from its fork to its end: the process itself, and its parent's side of it."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from trainer.rank_spec import RankSpec

Entry = Callable[[RankSpec], object]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_NAME = 15
_PF_EXITING = 0x4  # <linux/sched.h>
_LONGEST_ERROR = 2000  # characters; far below what a pipe holds, so that a dying rank never blocks on its report


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended."""

    rank: int
    time: float
    """When it failed, or else was found to have ended (Unix seconds)."""
    error: str | None = None
    """What went wrong, as one line to follow "rank 3 "; None where it ended well."""
    user_error: str | None = None
    """The text of the UserError that it raised."""
    by_signal: bool = False
    """Died of a signal; where ranks fail together, such a death explains the others."""
    killed: bool = False
    """By its parent, on request."""


class ForkedRank:
    """The parent's side of a rank that has not been reaped."""

    def __init__(self, rank: int, pid: int, report_fd: int) -> None:
        self._rank, self._pid, self._report_fd = rank, pid, report_fd
        self._pidfd = os.pidfd_open(pid)
        self._killed = False
        os.set_blocking(report_fd, False)

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._pidfd

    def kill(self) -> None:
        """SIGKILL, unless it is ending by itself; that begins before the peers see its connections close."""
        _, _, state_to_flags = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")
        flags = int(state_to_flags.split()[6])
        if not flags & _PF_EXITING:
            self._killed = True
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def reap(self) -> RankEnd:
        """Wait for its end."""
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        report = self._last_words()
        os.close(self._report_fd)
        os.close(self._pidfd)
        if code < 0:
            error = f"was killed by {_signal_name(-code)}"
            return RankEnd(self._rank, time.time(), error, by_signal=True, killed=self._killed)
        return report or RankEnd(self._rank, time.time(), f"exited with code {code} before its end")

    def _last_words(self) -> RankEnd | None:
        with contextlib.suppress(BlockingIOError):  # silent, and a child of its own still has the pipe open
            words = os.read(self._report_fd, 1 << 16)
            return RankEnd(self._rank, **json.loads(words)) if words else None
        return None


def fork_rank(spec: RankSpec, entry: Entry, env: Mapping[str, str], logs: Path) -> ForkedRank:
    """Run `entry(spec)` in a fork of this process, with its output appended to `logs`/rank-<rank>.log."""
    report_fd, last_words_fd = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(report_fd)
        _be_rank(spec, entry, env, logs / f"rank-{spec.rank}.log", last_words_fd, parent)
    os.close(last_words_fd)
    return ForkedRank(spec.rank, pid, report_fd)


def _be_rank(
    spec: RankSpec, entry: Entry, env: Mapping[str, str], log_path: Path, last_words_fd: int, parent: int
) -> NoReturn:
    """The whole life of the forked process, which never returns into its parent's code."""
    code = 1
    try:
        die_with(parent)
        _prctl(_PR_SET_NAME, f"rank {spec.rank}".encode())  # what ps and top show
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(env)
        entry(spec)
        _say(last_words_fd)
        code = 0
    except BaseException as error:
        _say(last_words_fd, error=f"raised {one_line(error)}", user_error=_user_error(error))
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)  # threads and exit handlers that the entry leaves behind must not keep a failed rank alive


def _say(descriptor: int, **fields: str | None) -> None:
    os.write(descriptor, json.dumps({"time": time.time(), **fields}).encode())


def one_line(error: BaseException) -> str:
    """Its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:_LONGEST_ERROR] if lines else type(error).__name__


def _user_error(error: BaseException) -> str | None:
    from trainer.config import UserError  # slow to import, and the entry has done so already, or raised none

    return str(error)[:_LONGEST_ERROR] if isinstance(error, UserError) else None


def _signal_name(number: int) -> str:
    if number == signal.SIGKILL:
        return "SIGKILL (out of memory?)"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, the process `parent`, ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def live_on() -> None:
    """Undo `die_with`."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def _prctl(option: int, value: int | bytes) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value!r}) failed")
