"""What is done to a job in a drill, and when: signals to its parts, and whatever else a test thinks of."""

import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from drilled_run import DrilledRun, processes_of, read_proc
from small_run import BROADGAUGE
from trainer.events import EventReader

_LOOK_SECONDS = 0.002

Target = Literal["rank", "service", "fork server", "agent", "job", "job and service", "driver"]
"""The driver is the one process; the job is its process group, and the reaper ends the rest. A service that is not
killed at once with them may still save what it has."""


@dataclass(frozen=True)
class Deed:
    """What is done to a job, and when."""

    name: str
    do: Callable[[DrilledRun], bool]
    """Whether it could be done; else it is tried again."""
    sign: str
    """What is waited for, counted from the beginning of the command or from the last deed: `event KIND`, or a new
    file, `room PATTERN` or `checkpoints PATTERN`."""
    count: int = 1
    """How many of them."""
    delay_seconds: float = 0.0
    """From the sign to the deed."""
    ends_life: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {1000 * self.delay_seconds:.0f} ms after {self.count} x {self.sign}"


def kill(
    target: Target,
    sign: str,
    count: int = 1,
    delay_seconds: float = 0.0,
    *,
    rank: int = 0,
    number: signal.Signals = signal.SIGKILL,
    ends_life: bool = True,
) -> Deed:
    """A signal to a part of the job."""

    def do(run: DrilledRun) -> bool:
        whole = target in ("job", "job and service")
        pid, service = find(run, "job" if whole else target, rank), find(run, "service")
        if pid is None or (target == "job and service" and service is None):
            return False
        try:
            if target == "job and service" and service is not None:
                os.kill(service, number)
            (os.killpg if whole else os.kill)(pid, number)
        except ProcessLookupError:
            return False
        return True

    name = f"{number.name} to {f'rank {rank}' if target == 'rank' else target}"
    return Deed(name, do, sign, count, delay_seconds, ends_life and target != "service")


_STEPPING = ("event training_started", "event step", "event evaluated")
_SAVING = (
    "room step-*/rank-*.part",  # a rank copies its state
    "room step-*/request.json",
    "room step-*/manifest.json",
    "event checkpoint_snapshot",
    "checkpoints step-*.tmp/rank-*",
    "checkpoints step-*.tmp/part-*",
    "checkpoints step-*.tmp/manifest.json*",
    "checkpoints step-????????",
    "checkpoints step-*.removed",
    "event checkpoint_saved",
)
_WEIGHTS: dict[Target, int] = {"rank": 20, "service": 20, "fork server": 2, "agent": 2, "job": 3, "job and service": 3}


def plan_kills(seed: int, number: int) -> tuple[list[Deed], list[Deed]]:
    """Kills of parts and of the whole job, at random moments, most of them while something is being saved."""
    draw = random.Random(seed)

    def one() -> tuple[Target, Deed]:
        target = draw.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        saves = target == "service" or draw.random() < 0.6
        sign = draw.choice(_SAVING if saves else _STEPPING)
        count = 1 if sign in ("event training_started", "event evaluated") else draw.randint(1, 4)
        delay = draw.choice((0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.2)))
        return target, kill(target, sign, count, delay, rank=draw.randrange(4))

    drawn = [one() for _ in range(number)]
    whole = [deed for target, deed in drawn if target.startswith("job")]
    return [deed for _, deed in drawn if deed not in whole], whole


@dataclass(frozen=True)
class Done:
    """A deed that took place."""

    deed: Deed
    at: float
    """Unix seconds."""
    after_step: int


class Doer:
    """Does the next deeds of a plan while a command is at work."""

    def __init__(self, run: DrilledRun, deeds: deque[Deed], done: list[Done]) -> None:
        self._run, self._deeds, self._done = run, deeds, done
        self._events = EventReader(run.run_dir.events_path)
        self._events.skip_to_end()
        self._step = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="doer")

    def __enter__(self) -> "Doer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _work(self) -> None:
        while self._deeds and not self._is_over.is_set():
            deed = self._deeds[0]
            if not self._see(deed) or self._is_over.wait(deed.delay_seconds):
                return
            while not deed.do(self._run):  # a service may just be being replaced
                if self._is_over.wait(_LOOK_SECONDS):
                    return
            self._done.append(Done(self._deeds.popleft(), time.time(), self._step))

    def _see(self, deed: Deed) -> bool:
        where, pattern = deed.sign.split(" ", 1)
        folder = {"room": self._run.room, "checkpoints": self._run.run_dir.checkpoints}.get(where)
        before = found(folder, pattern)
        seen, num_events = set[Path](), 0
        while num_events + len(seen) < deed.count:
            if self._is_over.wait(_LOOK_SECONDS):
                return False
            for event in self._events.new_events():
                self._step = event["step"] if event["kind"] in ("step", "training_started") else self._step
                num_events += where == "event" and event["kind"] == pattern
            seen |= found(folder, pattern) - before
        return True


def found(folder: Path | None, pattern: str) -> set[Path]:
    """What matches in a folder in which others are at work: folders may go while they are looked into."""
    with suppress(FileNotFoundError):
        return set(folder.glob(pattern)) if folder else set()
    return set()


def find(run: DrilledRun, target: Target, rank: int = 0) -> int | None:
    """The process id of a part of the job."""
    if target == "agent":
        service = find(run, "service")
        return _parent(service) if service else None
    if target == "driver" and not any(BROADGAUGE in line for line in processes_of(run).values()):
        return os.getpid()
    command, name = {
        "rank": ("launcher.node.fork_server", f"rank {rank}"),  # a fork has the command line of its parent
        "fork server": ("launcher.node.fork_server", None),
        "service": ("launcher.node.checkpoint_process", None),
        "job": (BROADGAUGE, None),
        "driver": (BROADGAUGE, None),
        "job and service": (BROADGAUGE, None),
    }[target]
    for pid, line in processes_of(run).items():
        own_name = read_proc(pid, "comm").strip()
        if command in line and (own_name == name if name else not own_name.startswith("rank ")):
            return pid
    return None


def _parent(pid: int) -> int | None:
    fields = read_proc(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else None
