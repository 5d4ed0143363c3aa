"""Tasks of the data pipeline as Ray tasks, for a cluster whose machines share a file system.

Only task descriptions and counts pass through Ray: text is read from the sources and tokens are written to the shared
folder by the workers themselves.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from data_pipeline.tasks import MAX_TRIES, Advance, Done, Failed, Outcome, Report, Task, describe_failure
from launcher.job.cluster import connected
from trainer.config import UserError

_AHEAD = 2  # tasks queued for every CPU, so that none waits for the driver
_POLL_SECONDS = 0.2
WORKER_ENV = {"RAYON_NUM_THREADS": "1"}
"""For processes in which tasks run: the cluster's CPUs are shared by tasks, not by threads."""


@contextmanager
def ray_workers(address: str) -> Iterator["RayWorkers"]:
    """Workers of the Ray cluster at an address; `auto` means the one that runs on this machine.

    Raises:
        UserError: there is none to connect to.
    """
    with connected(address, WORKER_ENV):
        yield RayWorkers()


class RayWorkers:
    """See `data_pipeline.tasks.Workers`. Progress counts finished tasks alone."""

    def run(self, tasks: Sequence[Task], on_advance: Report) -> list[Outcome]:
        waiting, tries = deque(enumerate(tasks)), [0] * len(tasks)
        running: dict[ray.ObjectRef, int] = {}
        outcomes, finished = dict[int, Outcome](), Advance()
        remote = ray.remote(num_cpus=1, max_retries=0)(_run)
        while len(outcomes) < len(tasks):
            room = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < room:
                index, task = waiting.popleft()
                tries[index] += 1
                running[remote.remote(task)] = index
            done, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS)
            for reference in done:
                index = running.pop(reference)
                outcome = _outcome(reference)
                if isinstance(outcome, Done):
                    finished += outcome.advance
                elif outcome.is_final:
                    raise UserError(outcome.reason)
                elif tries[index] < MAX_TRIES:
                    waiting.appendleft((index, tasks[index]))
                    continue
                outcomes[index] = outcome
            on_advance(finished)
        return [outcomes[index] for index in range(len(tasks))]


def _run(task: Task) -> Outcome:
    """What a Ray worker does; exceptions of a task are answers, those that reach Ray are of its own."""
    import traceback

    latest = Advance()

    def keep(advance: Advance) -> None:
        nonlocal latest
        latest = advance

    try:
        result = task.run(keep)
    except BaseException as error:  # a panic of Rust is no `Exception`
        return describe_failure(error, traceback.format_exc())
    return Done(result, latest)


def _outcome(reference: ray.ObjectRef) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except RayError as error:
        return Failed(f"the worker died ({type(error).__name__}: {str(error).splitlines()[0]})")
    return outcome
