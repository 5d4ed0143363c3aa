"""What a cluster's list of jobs says about a run: which of them are its attempts, how each ended, what may come next.

Pure, so that it needs no cluster.
"""

import hashlib
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus

from launcher.job.failures import JobFailed
from trainer.config import UserError
from trainer.stop import Preempted

_EXIT_USER_ERROR, _EXIT_PREEMPTED, _EXIT_NOT_FOUND = 2, 75, 127
_LAST_WORDS = re.compile(r"^(?:error|failed|preempted): (.*)", flags=re.MULTILINE)
"""How the command line says why it ends."""


@dataclass(frozen=True)
class Attempt:
    """A job that works, or has worked, on a run."""

    number: int
    job: JobDetails

    @property
    def id(self) -> str:
        return str(self.job.submission_id)

    @property
    def is_active(self) -> bool:
        return not self.job.status.is_terminal()


def id_of(name: str, run_dir: Path, number: int = 1) -> str:
    """Of the n-th attempt at the run of this name in this folder: the same whoever asks."""
    place = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    return f"broadgauge-{name}-{place}" + (f"-{number}" if number > 1 else "")


def newest(name: str, run_dir: Path, jobs: Iterable[JobDetails]) -> Attempt | None:
    """The last attempt at the run among a cluster's jobs."""
    wanted = re.compile(re.escape(id_of(name, run_dir)) + r"(?:-(\d+))?")
    found = [(wanted.fullmatch(job.submission_id or ""), job) for job in jobs]
    attempts = [Attempt(int(match[1] or 1), job) for match, job in found if match]
    return max(attempts, key=lambda attempt: attempt.number, default=None)


def check_end(attempt: Attempt, logs: str) -> None:
    """Nothing, if the job succeeded.

    Args:
        logs: what it printed.

    Raises:
        Preempted: it was asked to end before its end.
        UserError: it was refused something that the user can mend.
        JobFailed: it failed.
    """
    job, code = attempt.job, attempt.job.driver_exit_code
    words = _LAST_WORDS.findall(logs)
    said = words[-1] if words else ""
    if job.status == JobStatus.SUCCEEDED:
        return
    if job.status == JobStatus.STOPPED or code == _EXIT_PREEMPTED:
        raise Preempted(f"{attempt.id} {said or 'was stopped'}; submit the run again to go on")
    if code == _EXIT_USER_ERROR and said:
        raise UserError(f"{attempt.id}: {said}")
    if code == _EXIT_NOT_FOUND:
        missing = shlex.split(job.entrypoint)[1]
        raise UserError(f"{attempt.id}: the cluster's head has no {missing}; give its interpreter's path with --python")
    if code is None:  # then the log does not know of it
        said = " ".join((job.message or "no reason was given").split())
    raise JobFailed(
        f"{attempt.id}: {said or f'exit code {code}'}; submit the run again to go on from its newest checkpoint"
    )
