"""What is read out of a cluster's list of jobs."""

from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from launcher.job.failures import JobFailed
from launcher.submit.attempts import Attempt, check_end, id_of, newest
from trainer.config import UserError
from trainer.stop import Preempted

RUN_DIR = Path("/shared/runs/small")
FIRST = id_of("small", RUN_DIR)


def job(submission_id: str | None, status: JobStatus = JobStatus.RUNNING, code: int | None = None) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION,
        submission_id=submission_id,
        status=status,
        entrypoint="exec /opt/python -c x",
        driver_exit_code=code,
        message="Job supervisor actor died:\nits node was lost",
    )


def test_a_run_is_known_by_name_and_folder() -> None:
    assert id_of("small", RUN_DIR) == FIRST
    assert FIRST.startswith("broadgauge-small-")
    assert len({FIRST, id_of("small", RUN_DIR / "b"), id_of("large", RUN_DIR), id_of("small", RUN_DIR, 2)}) == 4


def test_the_newest_attempt_is_the_one_of_the_highest_number() -> None:
    others = [None, "raysubmit_x", id_of("small", Path("/elsewhere"), 30), f"x{FIRST}", f"{FIRST}-2-3", f"{FIRST}-b"]
    assert newest("small", RUN_DIR, map(job, others)) is None
    ids = [id_of("small", RUN_DIR, number) for number in (2, 10, 1, 9)]
    found = newest("small", RUN_DIR, map(job, [*ids, *others]))
    assert found is not None and (found.number, found.id) == (10, f"{FIRST}-10")


@pytest.mark.parametrize("status", JobStatus)
def test_an_attempt_is_active_until_it_has_ended(status: JobStatus) -> None:
    assert Attempt(1, job(FIRST, status)).is_active == (status in (JobStatus.PENDING, JobStatus.RUNNING))


def test_each_end_is_told_apart() -> None:
    def end(status: JobStatus, code: int | None, logs: str = "starting\nerror: no room\n") -> None:
        check_end(Attempt(1, job(FIRST, status, code)), logs)

    end(JobStatus.SUCCEEDED, 0)
    with pytest.raises(Preempted, match=f"^{FIRST} SIGTERM: saved; submit the run again to go on$"):
        end(JobStatus.STOPPED, None, "starting\npreempted: SIGTERM: saved\n")
    with pytest.raises(Preempted, match=f"^{FIRST} was stopped; submit the run again"):
        end(JobStatus.STOPPED, None, "")
    with pytest.raises(Preempted, match=f"^{FIRST} node 2 is to be drained; submit the run again"):
        end(JobStatus.FAILED, 75, "preempted: node 2 is to be drained")
    with pytest.raises(UserError, match=f"^{FIRST}: no room$"):
        end(JobStatus.FAILED, 2)
    with pytest.raises(UserError, match=f"^{FIRST}: the cluster's head has no /opt/python; give .* --python$"):
        end(JobStatus.FAILED, 127, "")
    with pytest.raises(JobFailed, match=f"^{FIRST}: RankFailed: rank 3 died; submit the run again"):
        end(JobStatus.FAILED, 1, "failed: RankFailed: rank 3 died\nnoise\n")
    with pytest.raises(JobFailed, match=f"^{FIRST}: exit code -9; submit the run again"):
        end(JobStatus.FAILED, -9, "train: error: is a word of the text")
    with pytest.raises(JobFailed, match=f"^{FIRST}: Job supervisor actor died: its node was lost; submit"):
        end(JobStatus.FAILED, None)
