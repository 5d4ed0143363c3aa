"""Worker processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Self

from data_pipeline.tasks import MAX_TRIES, Advance, Done, Failed, Outcome, Report, Task
from trainer.section import UserError


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    job: "_Job | None" = None


@dataclass
class _Job:
    index: int
    task: Task
    tries: int = 0
    advance: Advance = field(default_factory=Advance)


class LocalWorkers:
    """So many processes; a context manager that ends them."""

    def __init__(self, num_workers: int) -> None:
        self._workers = [self._start() for _ in range(num_workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._end(worker)

    def run(self, tasks: Sequence[Task], on_advance: Report) -> list[Outcome]:
        """See `data_pipeline.tasks.Workers`."""
        try:
            return self._run([_Job(index, task) for index, task in enumerate(tasks)], on_advance)
        finally:
            self._replace_busy()

    def _run(self, jobs: list[_Job], on_advance: Report) -> list[Outcome]:
        waiting, outcomes, finished = deque(jobs), dict[int, Outcome](), Advance()
        while len(outcomes) < len(jobs):
            for worker in self._workers:
                if worker.job is None and waiting:
                    self._give(worker, waiting.popleft())
            busy = [worker for worker in self._workers if worker.job]
            for ready in connection.wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is ready)
                job, outcome = self._hear(worker)
                if isinstance(outcome, Failed) and not outcome.is_final and job.tries < MAX_TRIES:
                    job.advance = Advance()
                    waiting.appendleft(job)
                elif outcome is not None:
                    _stop_if_final(outcome)
                    outcomes[job.index] = outcome
                    finished += job.advance
            on_advance(sum((worker.job.advance for worker in self._workers if worker.job), finished))
        return [outcomes[index] for index in range(len(jobs))]

    def _give(self, worker: _Worker, job: _Job) -> None:
        worker.job = job
        job.tries += 1
        with suppress(OSError):  # it may have died while idle: hearing from it says so
            worker.connection.send(job.task)

    def _hear(self, worker: _Worker) -> tuple[_Job, Outcome | None]:
        """The worker's job, and its outcome if it has ended; a dead worker is replaced."""
        job = worker.job
        assert job is not None
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.job = None
            outcome = Failed(f"the worker died ({_describe_end(worker.process)})")
            self._end(worker)
            self._workers[self._workers.index(worker)] = self._start()
            return job, outcome
        if isinstance(message, Advance):
            job.advance = message
            return job, None
        worker.job = None
        if isinstance(message, Done):
            job.advance = message.advance
        return job, message

    def _replace_busy(self) -> None:
        """Workers that a run was left with, by an exception, must not answer for it in the next one."""
        for number, worker in enumerate(self._workers):
            if worker.job:
                self._end(worker)
                self._workers[number] = self._start()

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "RAYON_NUM_THREADS": "1",  # of rensa, which would start as many threads in every worker as there are cores
        }
        with theirs, _without_ctrl_c():
            descriptor = theirs.fileno()
            process = subprocess.Popen(
                # -P: no file in the folder that the user works in passes for a module
                [sys.executable, "-P", "-m", "data_pipeline.worker", str(descriptor)],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        return _Worker(process, Connection(ours.detach()))

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()  # first: it would complain of a closed connection
        worker.process.wait()
        worker.connection.close()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes started in here never hear of it: it reaches the driver too, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe_end(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _stop_if_final(outcome: Outcome) -> None:
    if isinstance(outcome, Failed) and outcome.is_final:
        raise UserError(outcome.reason)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
