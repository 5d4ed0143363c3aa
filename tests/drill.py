"""Jobs that are killed at seeded moments and started again until they end, held against one that nobody disturbed."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from data_pipeline.pipeline import prepare
from launcher import job as jobs
from launcher import stages
from launcher.display import Display
from launcher.embedded_ray import embedded_ray
from launcher.job import JobFailed, NodeFailed, Ranks
from launcher.session import session
from launcher.stages import ClaimedRun
from small_run import BROADGAUGE, write_config
from trainer import config_file
from trainer.checkpoint import store
from trainer.checkpoint.global_tensors import GlobalTensors
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.room import room_path
from trainer.config import RunConfig
from trainer.data.digest import as_hex, from_hex
from trainer.data.ledger.audit import audit
from trainer.events import Event, EventReader, read_events, surviving_steps
from trainer.run_dir import RunDir
from trainer.schedule import Schedule
from trainer.stop import Preempted
from trainer.training_state import STATE_KINDS

PATIENCE_SECONDS = 120  # only a broken program waits this long
NUM_STEPS = 16
_LOOK_SECONDS = 0.002

LAYOUTS: dict[str, dict[str, int]] = {
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2 x DP2 ZeRO-1": {"tensor": 2, "pipeline": 1, "data": 2, "zero": 1},
}


# ----------------------------------------------------------------------------------------------------------- the job


@dataclass(frozen=True)
class DrilledRun:
    """A run of a small model, and the files of its config."""

    config: RunConfig
    config_file: Path
    run_dir: RunDir

    @property
    def snapshots_in(self) -> Path:
        return Path(self.config.checkpoint.snapshots_in)

    @property
    def room(self) -> Path:
        return room_path(self.snapshots_in, self.run_dir.path, node=0)

    @property
    def command(self) -> list[str]:
        return [BROADGAUGE, "train", str(self.config_file), "--run-dir", str(self.run_dir.path)]

    def events(self, *kinds: str) -> list[Event]:
        return [event for event in read_events(self.run_dir.events_path) if not kinds or event["kind"] in kinds]


class SmallJob:
    """Prepared data, and configs that train on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = config_file.load(write_config(folder))
        prepare(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_length=config.model.seq_length,
            out=folder / "data",
            min_train_tokens=config.tokens_per_step + 1,
            workers=1,
        )

    def new_run(
        self,
        folder: Path,
        num_steps: int = NUM_STEPS,
        layout: str = "TP2 x PP2",
        **checkpoint: Any,
    ) -> DrilledRun:
        """A run of so many steps whose snapshots lie in its own folder unless `checkpoint` says otherwise."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "snapshots").mkdir()
        every = {"every_steps": 4, "snapshot_every_steps": 1, "keep_last": 3}
        path = write_config(
            folder,
            train={"total_tokens": num_steps * 8 * 32, "global_batch_size": 8, "micro_batch_size": 2},
            data={"prepared": str(self._folder / "data")},
            optimizer={"warmup_tokens": 1000},
            parallel=LAYOUTS[layout],
            evaluation={"every_steps": 10, "max_sequences": 4},
            checkpoint={**every, "snapshots_in": str(folder / "snapshots"), **checkpoint},
            launch={"threads_per_rank": 1},
        )
        return DrilledRun(config_file.load(path), path, RunDir(folder / "run"))


# ------------------------------------------------------------------------------------------------------------ the deeds

Target = Literal["rank", "service", "fork server", "agent", "job", "job and service", "driver"]
"""The driver is the one process; the job is its process group, and the reaper ends the rest. A service that is not
killed at once with them may still save what it has."""


@dataclass(frozen=True)
class Deed:
    """What is done to a job, and when in its life."""

    name: str
    do: "Callable[[DrilledRun], bool]"
    """Whether it could be done; else it is tried again."""
    sign: str
    """What is waited for, counted from the beginning of the life or from the last deed in it: `event KIND`, or a new
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
    """Does the next deeds of a plan during one life of a job: several, as long as they do not end it."""

    def __init__(self, run: DrilledRun, deeds: deque[Deed], done: list[Done]) -> None:
        self._run, self._deeds, self._done = run, deeds, done
        self._events = EventReader(run.run_dir.events_path)
        self._events.skip_to_end()
        self._step = 0
        self._life_ends = threading.Event()
        self._thread = threading.Thread(target=self._work, name="doer")

    def __enter__(self) -> "Doer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._life_ends.set()
        self._thread.join()

    def _work(self) -> None:
        while self._deeds and not self._life_ends.is_set():
            deed = self._deeds[0]
            if not self._see(deed) or self._life_ends.wait(deed.delay_seconds):
                return
            while not deed.do(self._run):  # a service may just be being replaced
                if self._life_ends.wait(_LOOK_SECONDS):
                    return
            self._done.append(Done(self._deeds.popleft(), time.time(), self._step))
            if deed.ends_life:
                return

    def _see(self, deed: Deed) -> bool:
        where, pattern = deed.sign.split(" ", 1)
        folder = {"room": self._run.room, "checkpoints": self._run.run_dir.checkpoints}.get(where)
        before = set(folder.glob(pattern)) if folder else set()
        seen, num_events = set[Path](), 0
        while num_events + len(seen) < deed.count:
            if self._life_ends.wait(_LOOK_SECONDS):
                return False
            for event in self._events.new_events():
                self._step = event["step"] if event["kind"] in ("step", "training_started") else self._step
                num_events += where == "event" and event["kind"] == pattern
            seen |= set(folder.glob(pattern)) - before if folder else set()
        return True


def find(run: DrilledRun, target: Target, rank: int = 0) -> int | None:
    """The process id of a part of the job."""
    if target == "agent":
        service = find(run, "service")
        return _parent(service) if service else None
    if target == "driver" and not any(BROADGAUGE in line for line in processes_of(run).values()):
        return os.getpid()
    command, name = {
        "rank": ("launcher.fork_server", f"rank {rank}"),  # a fork has the command line of its parent
        "fork server": ("launcher.fork_server", None),
        "service": ("launcher.checkpoint_process", None),
        "job": (BROADGAUGE, None),
        "driver": (BROADGAUGE, None),
        "job and service": (BROADGAUGE, None),
    }[target]
    for pid, line in processes_of(run).items():
        own_name = _read(pid, "comm").strip()
        if command in line and (own_name == name if name else not own_name.startswith("rank ")):
            return pid
    return None


def processes_of(run: DrilledRun) -> dict[int, str]:
    """Process id -> command line of what works on the run."""
    lines = {int(pid): _read(pid, "cmdline").replace("\0", " ") for pid in os.listdir("/proc") if pid.isdigit()}
    return {pid: line for pid, line in lines.items() if f"{run.run_dir.path}" in line and _state(pid) not in "ZX"}


def _read(pid: int | str, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _state(pid: int) -> str:
    return _read(pid, "stat").rpartition(")")[2].strip()[:1] or "X"


def _parent(pid: int) -> int | None:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else None


# ------------------------------------------------------------------------------------------------------------ the lives


@contextmanager
def one_ray() -> Iterator[Path]:
    """A Ray in this process for many lives of many jobs."""
    with session() as folder, embedded_ray(folder):
        yield folder


def claimed(run: DrilledRun) -> AbstractContextManager[ClaimedRun]:
    return stages.claim(run.config, run.run_dir, Display(Console(quiet=True)))


class Supervisor:
    """Keeps agents of a run on the Ray of this process and has them train; new ones after they were lost."""

    def __init__(self, run: DrilledRun, folder: Path) -> None:
        self._run, self._folder = run, folder
        self._resources: ExitStack | None = None
        self._ranks: Ranks | None = None
        self._num_jobs = 0

    def train(self) -> None:
        """One life, as `broadgauge train` does it.

        Raises:
            JobFailed: it was cut short.
            Preempted: it was asked to end.
        """
        with claimed(self._run) as claim:
            if self._ranks is None:
                self._ranks = self._start()
            claim._ranks = self._ranks
            try:
                stages.train(claim)
            except NodeFailed:
                self.end()
                raise
            except Preempted as end:
                if "stopped after step" not in str(end):
                    self.end()
                raise

    def _start(self) -> Ranks:
        job = jobs._new_job(self._run.config, self._run.run_dir, jobs.RANK_TARGET)
        self._num_jobs += 1
        rendezvous = self._folder / f"{job.id}-{self._num_jobs}"
        rendezvous.mkdir()
        with ExitStack() as resources:
            resources.enter_context(jobs._owned(job))
            store.clear_leftovers(self._run.run_dir.checkpoints)
            ranks = resources.enter_context(jobs.ranks_on_cluster(job, rendezvous))
            self._resources = resources.pop_all()
        return ranks

    def end(self) -> None:
        if self._resources is not None:
            self._resources.close()
        self._resources = self._ranks = None


@contextmanager
def supervised(run: DrilledRun, folder: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(run, folder)
    try:
        yield supervisor
    finally:
        supervisor.end()


def train_to_the_end(run: DrilledRun, folder: Path, deeds: Iterable[Deed] = (), done: list[Done] | None = None) -> None:
    """Life after life on one Ray, until the run has ended; what is done to it is taken from `deeds`, if that is one."""
    planned, done = deeds if isinstance(deeds, deque) else deque(deeds), [] if done is None else done
    with supervised(run, folder) as supervisor:
        while True:
            before = len(done)
            try:
                with Doer(run, planned, done):
                    supervisor.train()
                return
            except (JobFailed, Preempted):
                assert len(done) > before, "it failed, and nothing was done to it"


def train_by_command(run: DrilledRun, deeds: deque[Deed], done: list[Done]) -> None:
    """The command again and again, until it succeeds."""
    while True:
        process = subprocess.Popen(
            run.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        with Doer(run, deeds, done):
            _, complaint = process.communicate(timeout=PATIENCE_SECONDS)
        if process.returncode == 0:
            return
        assert process.returncode == -signal.SIGKILL, complaint


# ---------------------------------------------------------------------------------------------------- what must hold


def expect_as_if_undisturbed(run: DrilledRun, undisturbed: DrilledRun) -> None:
    """The run has ended as the other has, bit for bit, and has left nothing behind."""
    expect_sound_resumes(run)
    expect_exact_ledger(run)
    assert history(run) == history(undisturbed)
    assert evaluations(run) == evaluations(undisturbed)
    expect_same_state(last_checkpoint(run), last_checkpoint(undisturbed))
    for step in store.steps(run.run_dir.checkpoints):
        store.verify(run.run_dir.checkpoints / store.folder_name(step))
    expect_nothing_left(run)


def history(run: DrilledRun) -> list[Event]:
    """The steps that count, without what may differ."""
    steps = surviving_steps(run.events())
    return [{name: value for name, value in step.items() if name not in ("time", "seconds")} for step in steps]


def evaluations(run: DrilledRun) -> dict[int, float]:
    """Held-out loss by step; a step that was evaluated twice has the same twice."""
    found: dict[int, float] = {}
    for event in run.events("evaluated"):
        assert found.setdefault(event["step"], event["loss"]) == event["loss"]
    return found


def last_checkpoint(run: DrilledRun) -> Path:
    return run.run_dir.checkpoints / store.folder_name(Schedule(run.config).num_steps)


def expect_sound_resumes(run: DrilledRun) -> None:
    """Every life but those before the first save began from a checkpoint, none older than one that was committed."""
    committed = 0
    for event in run.events("checkpoint_saved", "training_started"):
        if event["kind"] == "checkpoint_saved":
            committed = max(committed, event["step"])
            continue
        assert event["step"] >= committed
        if event["checkpoint"] is None:
            assert (event["step"], committed) == (0, 0)
        else:
            folder = run.room if event["tier"] == "memory" else run.run_dir.checkpoints
            assert Path(event["checkpoint"]) == folder.resolve() / store.folder_name(event["step"])


def expect_exact_ledger(run: DrilledRun) -> None:
    """Every sample once, and the checkpoint says so too."""
    steps, next_sample, digest = surviving_steps(run.events()), 0, 0
    assert [step["step"] for step in steps] == list(range(1, Schedule(run.config).num_steps + 1))
    for step in steps:
        assert step["first_sample"] == next_sample
        next_sample += step["num_samples"]
        digest += from_hex(step["tokens_xxh3"])
    assert not audit(run.run_dir).findings
    manifest = read_manifest(last_checkpoint(run))
    assert (manifest.consumed_samples, manifest.data_digest) == (next_sample, as_hex(digest))


def expect_same_state(mine: Path, theirs: Path) -> None:
    for kind in STATE_KINDS:
        ours, other = GlobalTensors(mine, kind), GlobalTensors(theirs, kind)
        assert ours.shapes == other.shapes and ours.shapes
        for name in ours:
            assert torch.equal(ours[name].view(torch.int32), other[name].view(torch.int32)), f"{kind}/{name}"


def expect_nothing_left(run: DrilledRun) -> None:
    """No process, no memory, and no file that is half of something."""
    assert not processes_of(run)
    assert not list(run.snapshots_in.iterdir())
    left = [path for path in run.run_dir.checkpoints.iterdir() if path.suffix]
    assert not left


# ---------------------------------------------------------------------------------------------------- what took place


@dataclass
class Campaign:
    """Runs of one layout that are killed until a plan is carried out, each proved equal to the undisturbed one."""

    job: SmallJob
    folder: Path
    layout: str
    num_steps: int
    undisturbed: DrilledRun
    done: list[Done] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """What was killed when, and how long it took until training went on."""

    def carry_out(self, deeds: Sequence[Deed], ray: Path | None) -> None:
        """On the Ray of this process, or by the command where there is none."""
        planned = deque(deeds)
        while planned:
            run = self.job.new_run(self.folder / f"run-{len(self.done)}", self.num_steps, self.layout)
            before = len(self.done)
            if ray is None:
                train_by_command(run, planned, self.done)
            else:
                train_to_the_end(run, ray, planned, self.done)
            assert len(self.done) > before, f"the run ended before {planned[0]}"
            expect_as_if_undisturbed(run, self.undisturbed)
            self.lines += [summary(run, each) for each in self.done[before:]]
            shutil.rmtree(run.run_dir.path.parent)


def summary(run: DrilledRun, done: Done) -> str:
    """When the next step was done; if a life was ended, in the next one."""
    later = [event for event in run.events("training_started", "step") if event["time"] > done.at]
    if done.deed.ends_life:
        later = list(dropwhile(lambda event: event["kind"] == "step", later))
    steps = [event["time"] for event in later if event["kind"] == "step"]
    seconds = f"next step after {steps[0] - done.at:.1f} s" if steps else "all steps were done"
    return f"after step {done.after_step:3}: {done.deed}; {seconds}"
