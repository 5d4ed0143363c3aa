"""Jobs to which things are done, started again until they end, and held against one that nobody disturbed."""

import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from pathlib import Path

from rich.console import Console

from deeds import Deed, Doer, Done
from drilled_run import DrilledRun, SmallJob, expect_as_if_undisturbed
from launcher.job.embedded_ray import embedded_ray
from launcher.job.failures import JobFailed
from launcher.job.ranks import Ranks, ready_ranks
from launcher.job.session import session
from launcher.report.display import Display
from launcher.verbs import stages
from launcher.verbs.stages import ClaimedRun
from trainer.stop import Preempted

PATIENCE_SECONDS = 120  # only a broken program waits this long


@contextmanager
def one_ray() -> Iterator[None]:
    """A Ray in this process for many lives of many jobs."""
    with session() as folder, embedded_ray(folder):
        yield


@contextmanager
def claimed(run: DrilledRun) -> Iterator[ClaimedRun]:
    """By a command that uses the Ray to which this process is connected."""
    with stages.claim(run.config, run.run_dir, Display(Console(quiet=True))) as claim:
        claim.on_cluster = True
        yield claim


class Supervisor:
    """Keeps agents of a run on the Ray of this process and has them train."""

    def __init__(self, run: DrilledRun) -> None:
        self._run = run
        self._resources = ExitStack()
        self._ranks: Ranks | None = None

    def train(self) -> None:
        """As `broadgauge train` does it.

        Raises:
            JobFailed: it was cut short for good.
            Preempted: it was asked to end.
        """
        with claimed(self._run) as claim:
            if self._ranks is None:
                ready = ready_ranks(self._run.config, self._run.run_dir, on_cluster=True)
                self._ranks = self._resources.enter_context(ready)
            claim._ranks = self._ranks
            stages.train(claim)

    def end(self) -> None:
        self._resources.close()


@contextmanager
def supervised(run: DrilledRun) -> Iterator[Supervisor]:
    supervisor = Supervisor(run)
    try:
        yield supervisor
    finally:
        supervisor.end()


def train_to_the_end(run: DrilledRun, deeds: Iterable[Deed] = (), done: list[Done] | None = None) -> None:
    """Command after command on the Ray of this process, until the run has ended; `deeds` are done to it."""
    planned, done = deeds if isinstance(deeds, deque) else deque(deeds), [] if done is None else done
    with supervised(run) as supervisor:
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

    def carry_out(self, deeds: Sequence[Deed], *, by_command: bool) -> None:
        """On the Ray of this process, or by a command for each life of the job."""
        planned = deque(deeds)
        while planned:
            run = self.job.new_run(self.folder / f"run-{len(self.done)}", self.num_steps, self.layout)
            before = len(self.done)
            if by_command:
                train_by_command(run, planned, self.done)
            else:
                train_to_the_end(run, planned, self.done)
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
