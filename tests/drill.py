"""Jobs to which things are done, started again until they end, and held against one that nobody disturbed."""

import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from pathlib import Path

from rich.console import Console

from deeds import Deed, Doer, Done
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed
from launcher.job import ranks as jobs
from launcher.job.embedded_ray import embedded_ray
from launcher.job.failures import JobFailed
from launcher.job.fleet import fleet_of
from launcher.job.ranks import Ranks
from launcher.job.session import session
from launcher.report.display import Display
from launcher.verbs import stages
from launcher.verbs.stages import ClaimedRun
from trainer.checkpoint.format import store
from trainer.stop import Preempted

PATIENCE_SECONDS = 120  # only a broken program waits this long


@contextmanager
def one_ray() -> Iterator[Path]:
    """A Ray in this process for many lives of many jobs."""
    with session() as folder, embedded_ray(folder):
        yield folder


def claimed(run: DrilledRun) -> AbstractContextManager[ClaimedRun]:
    return stages.claim(run.config, run.run_dir, Display(Console(quiet=True)))


class Supervisor:
    """Keeps agents of a run on the Ray of this process and has them train."""

    def __init__(self, run: DrilledRun, folder: Path) -> None:
        self._run, self._folder = run, folder
        self._resources: ExitStack | None = None
        self._ranks: Ranks | None = None
        self._num_jobs = 0

    def train(self) -> None:
        """As `broadgauge train` does it.

        Raises:
            JobFailed: it was cut short for good.
            Preempted: it was asked to end.
        """
        with claimed(self._run) as claim:
            if self._ranks is None:
                self._ranks = self._start()
            claim._ranks = self._ranks
            stages.train(claim)

    def _start(self) -> Ranks:
        job = jobs.new_job(self._run.config, self._run.run_dir, self._folder)
        self._num_jobs += 1
        rendezvous = self._folder / f"{job.id}-{self._num_jobs}"
        rendezvous.mkdir()
        with ExitStack() as resources:
            resources.enter_context(jobs._owned(job))
            store.clear_leftovers(self._run.run_dir.checkpoints)
            ranks = Ranks(resources.enter_context(fleet_of(job, rendezvous)))
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
    """Command after command on one Ray, until the run has ended; what is done to it is taken from `deeds`."""
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
            expect_as_if_undisturbed(run, self.undisturbed)
            if len(self.done) == before:  # a sign that lasts a millisecond is not always seen so often
                assert planned[0].count > 1, f"the run ended before {planned[0]}"
                planned[0] = replace(planned[0], count=1)
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
