"""A rank's sign of life: what it is doing, since when, and how its time has gone, in a file that others may read.

    FOLDER/rank-00003.beat      of fixed size, mapped into the rank's memory: to say something takes microseconds
    FOLDER/rank-00003.stack     where the rank prints its Python stack when it is asked to, even if it waits in C

The folder is on a tmpfs, so no disk can hold a rank up. Nothing is locked. A beat is written to the one of two slots
that holds the older, and carries a checksum: a rank that is stopped or killed while it writes leaves the one before.

Imports no torch, so that the launcher can read beats.
"""

import faulthandler
import math
import mmap
import os
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias, get_args

StepPhase: TypeAlias = Literal["loading data", "computing", "reducing gradients", "updating", "agreeing"]
"""Of a step, in order. Computing is forward and backward; under ZeRO 2 and 3 most of the reduction happens in it."""
Phase: TypeAlias = StepPhase | Literal["starting", "evaluating", "saving", "restoring", "ending"]

STEP_PHASES: tuple[StepPhase, ...] = get_args(StepPhase)
PHASES: tuple[Phase, ...] = (*STEP_PHASES, "starting", "evaluating", "saving", "restoring", "ending")
_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_STARTING = _NUMBERS["starting"]
_SLOT_BYTES = 512
_LENGTHS = len(PHASES), len(PHASES), 2 * len(STEP_PHASES), 4
"""Numbers of a beat: time in each phase, of it waited, both of the last step, memory."""
_BODY = struct.Struct(f"=QQQQqQQdd{sum(_LENGTHS)}d")
_MEMORY_SECONDS = 1.0  # between two measurements, which take tens of microseconds
_CHECKSUM = struct.Struct("=I")
_TRIES = 10
"""Reads of a file of which both slots are being written: the rank would have to beat twice in each."""


@dataclass(frozen=True)
class Memory:
    """What a rank holds, in bytes."""

    allocated: int = 0
    """Of the device, in tensors."""
    reserved: int = 0
    """Of the device, used or not."""
    resident: int = 0
    """Of the host."""
    taken: int = 0
    """Of the device, by tensors, libraries and the driver, and by other processes if there are any."""

    @property
    def planned_for(self) -> int:
        """What a plan speaks of: all of the device, or of the host where that computes."""
        return self.taken or self.resident


@dataclass(frozen=True)
class StepTime:
    """How a rank's time went in its last step."""

    seconds: Mapping[StepPhase, float]
    waited: Mapping[StepPhase, float]
    """Of these, waiting for other ranks, as far as it can tell."""

    @property
    def own_seconds(self) -> float:
        """In which it worked, and others may have waited for it."""
        return sum(self.seconds.values()) - sum(self.waited.values())


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    pid: int
    start_ticks: int
    """See `ProcessStat`: with the pid, the process for good."""
    main_thread: int
    """As Python's stack dumps name it."""
    step: int
    """Last completed; zero before the first."""
    num_steps: int
    """Completed by this process."""
    phase: Phase
    began: float
    """When the phase began (Unix seconds)."""
    silent_seconds: float
    """Between what it said last and this reading, by a clock that nobody sets."""
    seconds: Mapping[Phase, float]
    """Spent in each phase, but for the one it is in now."""
    waited: Mapping[Phase, float]
    """Of `seconds`, those in which the process waited for other ranks, as far as it can tell."""
    last_step: StepTime = StepTime({}, {})
    memory: Memory = Memory()


class Heartbeat:
    """The writing side, of one rank."""

    measure: Callable[[], Memory] = Memory
    """Tells what the process holds; is called after a step, once a second at most."""

    def __init__(self, path: Path | None = None) -> None:
        """Without a path, or where no memory is left for the file, nobody is told anything."""
        self._map = _new_file(path) if path is not None else None
        self._count, self._phase, self._step, self._num_steps = 0, _STARTING, 0, 0
        self._seconds, self._waited = [0.0] * len(PHASES), [0.0] * len(PHASES)
        self._before_step = [*self._seconds, *self._waited]
        self._last_step = [0.0] * (2 * len(STEP_PHASES))
        self._measured, self._memory = -math.inf, Memory()
        self._began, self._began_unix = time.monotonic(), time.time()
        if self._map is not None and path is not None:
            pid = os.getpid()
            self._process = pid, process_stat(pid).start_ticks, threading.main_thread().ident or 0
            self._write(self._began)
            os.replace(_unfinished(path), path)  # of an earlier life, which others may have open

    @property
    def is_kept(self) -> bool:
        """Whether anybody can read it."""
        return self._map is not None

    def phase(self, phase: Phase) -> None:
        """From now on the rank does this."""
        now = self._count_time()
        self._phase, self._began_unix = _NUMBERS[phase], time.time()
        self._write(now)

    def step_done(self, step: int) -> None:
        now = self._count_time()
        self._step, self._num_steps = step, self._num_steps + 1
        counted, num = [*self._seconds, *self._waited], len(STEP_PHASES)
        spent = [after - before for after, before in zip(counted, self._before_step, strict=True)]
        self._last_step, self._before_step = [*spent[:num], *spent[len(PHASES) :][:num]], counted
        if now - self._measured > _MEMORY_SECONDS:
            self._memory, self._measured = self.measure(), now
        self._write(now)

    @property
    def last_step(self) -> StepTime:
        return _step_time(self._last_step)

    def _count_time(self) -> float:
        now = time.monotonic()
        self._seconds[self._phase] += now - self._began
        self._began = now
        return now

    def waited(self, seconds: float) -> None:
        """So much of the phase was spent waiting for other ranks; is told with the next beat."""
        self._waited[self._phase] += seconds

    def _write(self, now: float) -> None:
        if self._map is None:
            return
        self._count += 1
        body = _BODY.pack(
            self._count,
            *self._process,
            self._step,
            self._num_steps,
            self._phase,
            self._began_unix,
            now,
            *self._seconds,
            *self._waited,
            *self._last_step,
            self._memory.allocated,
            self._memory.reserved,
            self._memory.resident,
            self._memory.taken,
        )
        start = self._count % 2 * _SLOT_BYTES
        self._map[start : start + _BODY.size + _CHECKSUM.size] = body + _CHECKSUM.pack(zlib.crc32(body))


def read(path: Path) -> Beat | None:
    """What the rank of this file said last; None if there is no such file, or none that can be understood."""
    for _ in range(_TRIES):
        try:
            content = path.read_bytes()
        except OSError:
            return None
        bodies = [body for start in (0, _SLOT_BYTES) if (body := _sound_body(content[start:])) is not None]
        if bodies:
            return _beat_of(max(bodies))
    return None


def _sound_body(slot: bytes) -> tuple[float, ...] | None:
    if len(slot) < _BODY.size + _CHECKSUM.size:
        return None
    body = slot[: _BODY.size]
    (checksum,) = _CHECKSUM.unpack_from(slot, _BODY.size)
    fields = _BODY.unpack(body)
    return fields if fields[0] and zlib.crc32(body) == checksum else None


def _beat_of(fields: tuple[float, ...]) -> Beat:
    _, pid, start_ticks, main_thread, step, num_steps, phase, began, said, *numbers = fields
    rest = iter(numbers)
    seconds, waited, last_step, memory = (list(islice(rest, length)) for length in _LENGTHS)
    return Beat(
        pid=int(pid),
        start_ticks=int(start_ticks),
        main_thread=int(main_thread),
        step=int(step),
        num_steps=int(num_steps),
        phase=PHASES[int(phase)],
        began=began,
        silent_seconds=max(0.0, time.monotonic() - said),
        seconds=dict(zip(PHASES, seconds, strict=True)),
        waited=dict(zip(PHASES, waited, strict=True)),
        last_step=_step_time(last_step),
        memory=Memory(*map(int, memory)),
    )


def _step_time(numbers: Sequence[float]) -> StepTime:
    """From seconds, then those waited, of each phase of a step."""
    num = len(STEP_PHASES)
    return StepTime(
        dict(zip(STEP_PHASES, numbers[:num], strict=True)), dict(zip(STEP_PHASES, numbers[num:], strict=True))
    )


# ------------------------------------------------------------------------------------------------------------ the files


class Ask(IntEnum):
    """The signals by which a rank is asked for stacks."""

    MAIN_THREAD = signal.SIGUSR1
    """The main thread, to which it is to be sent, reads its own frames alone. Where it waits in the kernel that is
    harmless. Of ranks at work one in about twenty thousand dies of it: it was just entering a Python function."""
    ALL_THREADS = signal.SIGUSR2
    """The main thread reads the frames of others, which may be running: of that a rank that is at work dies in up to
    one of some hundred cases. For ranks that hang, and are to be killed anyway."""


def beat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05}.beat"


def stack_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05}.stack"


def answer_with_stacks(path: Path) -> None:
    """From now on a signal has this process append its stack to the file, whatever it is doing; see `Ask`."""
    try:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 - for as long as the process lives
    except OSError as error:
        print(f"no stacks will be told: {error}", file=sys.stderr, flush=True)
        return
    os.truncate(path, 0)
    for ask in Ask:
        faulthandler.register(ask, file=file, all_threads=ask is Ask.ALL_THREADS, chain=False)


def _new_file(path: Path) -> mmap.mmap | None:
    """A file of which every byte has its memory: one that had none would kill the rank when it writes."""
    try:
        descriptor = os.open(_unfinished(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, 2 * _SLOT_BYTES)
            return mmap.mmap(descriptor, 2 * _SLOT_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        print(f"no heartbeat will be kept: {error}", file=sys.stderr, flush=True)
        return None


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


# -------------------------------------------------------------------------------------------------------- the processes


@dataclass(frozen=True)
class ProcessStat:
    """What the kernel says of a process."""

    state: str
    """One letter, as in ps: R running, S and D waiting, T stopped, Z dead and not reaped."""
    start_ticks: int
    """When it began, in clock ticks since boot: no other process with its pid began then."""


def process_stat(pid: int) -> ProcessStat:
    """Raises:
    OSError: there is no such process.
    """
    _, _, fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    state, *numbers = fields.split()
    return ProcessStat(state, int(numbers[18]))
