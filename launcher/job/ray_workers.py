"""Tasks of the data pipeline as Ray tasks, for a cluster whose machines share a file system.

Only task descriptions and counts pass through Ray: text is read from the sources and tokens are written to the shared
folder by the workers themselves.
"""

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.exceptions import RayError

from data_pipeline.tasks import MAX_TRIES, Advance, Done, Failed, Outcome, Report, Task, describe_failure
from trainer.config import UserError

_AHEAD = 2  # tasks queued for every CPU, so that none waits for the driver
_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 10.0  # that a cluster may take to accept a connection


@contextmanager
def ray_workers(address: str) -> Iterator["RayWorkers"]:
    """Workers of the Ray cluster at an address; `auto` means the one that runs on this machine.

    Raises:
        UserError: there is none to connect to.
    """
    assert not ray.is_initialized()
    try:
        ray.init(
            address=_listening(address),
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {"RAYON_NUM_THREADS": "1"} | _path_of_this_code()},
        )
    except (OSError, RayError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--ray {address}: no Ray cluster to connect to ({reason}); start one, or leave --ray out"
        ) from error
    try:
        yield RayWorkers()
    finally:
        ray.shutdown()


def _listening(address: str) -> str:
    """The cluster's host:port, where something answers: Ray itself would try for minutes.

    Raises:
        OSError: nothing does, or there is no cluster to find.
    """
    found = canonicalize_bootstrap_address_or_die(address)
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nothing answers at {found}: {error.strerror or error}") from error
    return found


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


def _path_of_this_code() -> dict[str, str]:
    """Where a driver found its packages by PYTHONPATH, so do its workers, whatever folder they run in."""
    paths = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))} if paths else {}
