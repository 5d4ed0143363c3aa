"""Submission by Ray Jobs: over the HTTP API of a cluster's dashboard, so no Ray port but that one need be reachable.

The job is `broadgauge run CONFIG --run-dir DIR --ray auto` on the cluster's head. Asked to stop, Ray sends it SIGTERM,
as any preemption does, and waits as long as a run may take to save.
"""

import asyncio
import logging
import math
import os
import shlex
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from launcher.job.failures import JobFailed
from launcher.planning.cluster import with_its_facts
from launcher.submit.attempts import Attempt, check_end, id_of, newest
from launcher.submit.package import CONFIG_NAME, check_paths, write_package
from trainer.config import RunConfig, UserError
from trainer.stop import Interrupted

_DASHBOARD_PORT = 8265  # Ray's default
_ANSWER_SECONDS = 10.0  # that a cluster may take to accept a connection
_SILENCE_SECONDS = 60.0  # that it may take to answer
_POLL_SECONDS = 0.5
_ENDING_SECONDS = 60.0  # for a run to leave nothing behind after its grace period
_PROGRAM = "from launcher.cli.main import main; main()"
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray would obey rather than the address it is told."""

for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)  # they speak of every upload


@dataclass(frozen=True)
class Submitted:
    """A run that was handed to a cluster."""

    cluster: "Cluster"
    attempt: Attempt
    had_succeeded: bool = False
    """Before; then nothing was submitted now."""

    @property
    def line(self) -> str:
        """What has happened, for a person."""
        if self.had_succeeded:
            return f"{self.attempt.id} has succeeded already; nothing to do (another --run-dir makes another run)"
        again = f", attempt {self.attempt.number}" if self.attempt.number > 1 else ""
        return f"submitted as {self.attempt.id}{again}, to {self.cluster.url}"


def submit(config: RunConfig, run_dir: Path, to: str, *, python: str = "python", force: bool = False) -> Submitted:
    """Have a cluster do the whole run, or go on with it.

    Args:
        run_dir: absolute, on a file system that all machines of the cluster share, the head too.
        to: `ray://HOST:PORT`, or `http://HOST:PORT` of the dashboard.
        python: interpreter on the cluster's head; a name alone is looked for on the PATH of its `ray start`.
        force: whether to go on where memory will not be enough.

    Raises:
        UserError: there is no such cluster, it does not let us in, or the run is at work there.
    """
    config = with_its_facts(config)
    check_paths(config, run_dir)
    cluster = Cluster.connect(to)
    with cluster.answering():
        last = cluster.newest(config, run_dir)
        if last is not None and last.is_active:
            raise _is_at_work(cluster, last)
        if last is not None and last.job.status == JobStatus.SUCCEEDED:
            return Submitted(cluster, last, had_succeeded=True)
        number = last.number + 1 if last is not None else 1
        return _start(cluster, config, run_dir, number, _entrypoint(python, run_dir, force))


def _start(cluster: "Cluster", config: RunConfig, run_dir: Path, number: int, entrypoint: str) -> Submitted:
    """Make the run's n-th attempt.

    Raises:
        UserError: somebody has made it a moment ago.
    """
    job_id = id_of(config.name, run_dir, number)
    with tempfile.TemporaryDirectory(prefix="broadgauge-") as folder:
        write_package(config, Path(folder))
        try:
            cluster.client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": _stop_env(config)},
                metadata={"run": config.name, "run_dir": str(run_dir)},
            )
        except RuntimeError:
            last = cluster.newest(config, run_dir)
            if last is None or last.number < number:
                raise
            raise _is_at_work(cluster, last) from None
    return Submitted(cluster, Attempt(number, cluster.client.get_job_info(job_id)))


def _is_at_work(cluster: "Cluster", attempt: Attempt) -> UserError:
    return UserError(f"{attempt.id} is at work on this run; {cluster.how_to_attend(attempt)}")


def follow(submitted: Submitted, show: Callable[[str], object], *, patience_seconds: float = 60.0) -> None:
    """Show what the job prints until it has ended.

    Args:
        patience_seconds: that the cluster may be out of reach.

    Raises:
        Interrupted: Ctrl-C; the job goes on.
        Preempted, UserError, JobFailed: how it ended, unless well; see `check_end`.
        JobFailed: the cluster is gone.
    """
    cluster, job_id = submitted.cluster, submitted.attempt.id
    if submitted.had_succeeded:
        return
    try:
        job, printed = asyncio.run(_follow(cluster.client, job_id, show, patience_seconds))
    except KeyboardInterrupt as interrupt:
        attend = cluster.how_to_attend(submitted.attempt)
        raise Interrupted(f"no longer following; the job goes on: {attend}") from interrupt
    check_end(Attempt(submitted.attempt.number, job), printed)


async def _follow(
    client: JobSubmissionClient, job_id: str, show: Callable[[str], object], patience_seconds: float
) -> tuple[JobDetails, str]:
    """The job when it has ended, and all that it has printed."""
    shown = 0

    async def tail() -> None:
        nonlocal shown
        while True:
            async for position, text in _log(client, job_id):
                if position > shown:
                    show(text[shown - position :])
                    shown = position
            await asyncio.sleep(_POLL_SECONDS)

    ending, tailing = asyncio.create_task(_ended(client, job_id, patience_seconds)), asyncio.create_task(tail())
    try:
        await asyncio.wait((ending, tailing), return_when=asyncio.FIRST_COMPLETED)
        if tailing.done():
            tailing.result()  # raises: `show` did
        job, printed = await ending
    finally:
        ending.cancel()
        tailing.cancel()
    show(printed[shown:])
    return job, printed


async def _log(client: JobSubmissionClient, job_id: str) -> AsyncIterator[tuple[int, str]]:
    """What the job prints, from the beginning, each piece with the number of characters up to its end."""
    position = 0
    with suppress(aiohttp.ClientError, OSError, RuntimeError):  # the connection broke: `_ended` finds out why
        async with aclosing(client.tail_job_logs(job_id)) as pieces:
            async for text in pieces:
                position += len(text)
                yield position, text


async def _ended(client: JobSubmissionClient, job_id: str, patience_seconds: float) -> tuple[JobDetails, str]:
    """Raises:
    JobFailed: the cluster does not answer for too long, or knows nothing of the job.
    """
    answered = time.monotonic()
    while True:
        try:
            job = client.get_job_info(job_id)
            answered = time.monotonic()
            if job.status.is_terminal():
                return job, client.get_job_logs(job_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered > patience_seconds:
                raise JobFailed(
                    f"lost {job_id}: the cluster does not answer, or does not know it ({_first_line(error)}); when it "
                    f"is back, submit the run again to go on from its newest checkpoint"
                ) from error
        await asyncio.sleep(_POLL_SECONDS)


def stop(config: RunConfig, run_dir: Path, to: str) -> str:
    """Have the run save and end; returns, when it has, the job's id.

    Raises:
        UserError: there is no such cluster, it does not let us in, or the run is not at work there.
    """
    cluster = Cluster.connect(to)
    with cluster.answering():
        last = cluster.newest(config, run_dir)
        if last is None or not last.is_active:
            told = f"{last.id} has ended ({last.job.status.value.lower()})" if last else "it was never submitted there"
            raise UserError(f"the run {config.name} in {run_dir} is not at work on {cluster.url}: {told}")
        while not cluster.client.get_job_status(last.id).is_terminal():  # Ray kills it when its time is over
            cluster.client.stop_job(last.id)  # again and again, as a job that is just being started does not hear it
            time.sleep(_POLL_SECONDS)
        return last.id


def _entrypoint(python: str, run_dir: Path, force: bool) -> str:
    """A shell's command line. `exec`, so that signals and the exit code are those of the run."""
    arguments = ["run", CONFIG_NAME, "--run-dir", str(run_dir), "--ray", "auto", *(["--force"] if force else [])]
    return f"exec {shlex.join([python, '-c', _PROGRAM, *arguments])}"


def _stop_env(config: RunConfig) -> dict[str, str]:
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(config.checkpoint.grace_seconds + _ENDING_SECONDS))}


# ---------------------------------------------------------------------------------------------------------- a cluster


class _Client(JobSubmissionClient):
    """Ray's, which would wait for ever for a machine that is gone."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=_SILENCE_SECONDS, **options)


@dataclass(frozen=True)
class Cluster:
    """The job server of a cluster's dashboard."""

    url: str
    client: JobSubmissionClient

    @classmethod
    def connect(cls, to: str) -> "Cluster":
        """Raises:
        UserError: nothing answers there, it is no job server, or it does not let us in.
        """
        url = dashboard_url(to)
        where = urlsplit(url)
        port = where.port or (443 if where.scheme == "https" else 80)
        try:
            socket.create_connection((where.hostname or "", port), timeout=_ANSWER_SECONDS).close()
        except OSError as error:
            raise UserError(
                f"--to {to}: nothing answers at {url} ({error.strerror or error}); start the cluster, or give its "
                f"dashboard's address, http://HOST:PORT"
            ) from error
        with _speaking_to(url), _without_overrides():
            return cls(url, _Client(url))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Raises:
        UserError: the job server refuses what it is asked within, or is gone.
        """
        with _speaking_to(self.url):
            yield

    def newest(self, config: RunConfig, run_dir: Path) -> Attempt | None:
        """The last attempt at a run."""
        return newest(config.name, run_dir, self.client.list_jobs())

    def how_to_attend(self, attempt: Attempt) -> str:
        logs, end = f"job logs --follow --address {self.url}", f"job stop --address {self.url}"
        return f"follow it with `ray {logs} {attempt.id}`, have it save and end with `ray {end} {attempt.id}`"


def dashboard_url(to: str) -> str:
    """The HTTP address of a cluster's dashboard.

    Of `ray://HOST:PORT`, that of a Ray client server, it is the dashboard's usual port on the same machine: asking the
    client server, as Ray's own tools do, takes the very Python and Ray of the cluster, and half a minute to fail.

    Raises:
        UserError: `to` is no such address.
    """
    where = urlsplit(to)
    try:
        host, port = where.hostname, where.port
    except ValueError:
        host, port = None, None
    if where.scheme not in ("ray", "http", "https") or not host:
        raise UserError(f"--to {to} is no address of a Ray cluster; use ray://HOST:10001 or http://HOST:8265")
    if where.scheme == "ray":
        return f"http://{f'[{host}]' if ':' in host else host}:{_DASHBOARD_PORT}"
    return f"{where.scheme}://{where.netloc}{where.path}".rstrip("/") if port else to.rstrip("/")


@contextmanager
def _speaking_to(url: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"{url} does not let us in ({_first_line(error)}); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
            f"cluster's token or RAY_AUTH_TOKEN_PATH to its file"
        ) from error
    except (OSError, requests.RequestException) as error:
        raise UserError(f"{url} does not answer as a Ray job server ({_first_line(error)})") from error
    except RuntimeError as error:
        raise UserError(f"{url} refuses: {_first_line(error)}") from error


@contextmanager
def _without_overrides() -> Iterator[None]:
    theirs = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(theirs)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
