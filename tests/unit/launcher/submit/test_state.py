"""What submitting a run once more does, for everything that a cluster may say of its RayJob."""

from typing import Any

import pytest

from launcher.submit.kubernetes import names
from launcher.submit.kubernetes.state import Deed, JobState, decide
from trainer.config import UserError


def found(deployment: str = "", job: str = "", *, queue: str | None = None, **more: Any) -> JobState:
    """Of the run `big`; `more` may be suspend, deletionTimestamp, run, managed_by, or fields of the status."""
    labels = {names.MANAGED_BY: more.pop("managed_by", names.US), **({names.QUEUE_LABEL: queue} if queue else {})}
    metadata = {
        "name": "big",
        "uid": "1",
        "labels": labels,
        "annotations": {names.RUN_ANNOTATION: more.pop("run", "big")},
    }
    if "deletionTimestamp" in more:
        metadata["deletionTimestamp"] = more.pop("deletionTimestamp")
    spec = {"suspend": more.pop("suspend", False)}
    return JobState.of(
        {"metadata": metadata, "spec": spec, "status": {"jobDeploymentStatus": deployment, "jobStatus": job, **more}}
    )


DECIDED = {
    "none": (None, Deed.CREATE),
    "succeeded": (found("Complete", "SUCCEEDED"), Deed.NOTHING),
    "stopped": (found("Complete", "STOPPED"), Deed.REPLACE),
    "failed": (found("Failed", "FAILED", failed=4), Deed.REPLACE),
    "failed before it ran": (found("Failed", reason="PreRunningDeadlineExceeded"), Deed.REPLACE),
    "no valid RayJob": (found("ValidationFailed"), Deed.REPLACE),
    "suspended by a person": (found("Suspended", suspend=True), Deed.REPLACE),
    "being deleted": (found("Running", "RUNNING", deletionTimestamp="2026-01-01T00:00:00Z"), Deed.REPLACE),
}


@pytest.mark.parametrize(("state", "deed"), DECIDED.values(), ids=DECIDED)
def test_what_has_ended_is_gone_on_with(state: JobState | None, deed: Deed) -> None:
    assert decide(state, "big") is deed


ACTIVE = {
    "just made": (found(), "not yet seen by the operator"),
    "starting": (found("Initializing"), "Initializing"),
    "running": (found("Running", "RUNNING"), "Running (RUNNING)"),
    "running again": (found("Running", "RUNNING", failed=2), "Running (RUNNING), after 2 lost"),
    "retrying": (found("Retrying", failed=1), "Retrying, after 1 lost"),
    "queued": (found("Suspended", suspend=True, queue="research"), "waiting in queue research"),
    "queued, not yet seen": (found(suspend=True, queue="research"), "waiting in queue research"),
    "preempted by Kueue": (found("Suspending", suspend=True, queue="research"), "waiting in queue research"),
    "suspending": (found("Suspending", suspend=True), "Suspending"),
    "let go on": (found("Suspended"), "Suspended"),
}


@pytest.mark.parametrize(("state", "said"), ACTIVE.values(), ids=ACTIVE)
def test_what_is_active_is_left_alone(state: JobState, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        decide(state, "big")
    assert f"is active: its RayJob big is {said};" in str(refusal.value) and "--delete" in str(refusal.value)


@pytest.mark.parametrize(
    ("state", "whose"),
    [
        (found("Complete", "SUCCEEDED", run="Big"), "the run Big"),
        (found("Failed", managed_by="someone"), "somebody else"),
        (JobState.of({"metadata": {"name": "big"}}), "somebody else"),
    ],
)
def test_what_is_of_others_is_never_touched(state: JobState, whose: str) -> None:
    with pytest.raises(UserError, match=f"belongs to {whose}; give this run another name"):
        decide(state, "big")


def test_a_failure_says_why_on_one_line() -> None:
    state = found("Failed", "FAILED", reason="AppFailed", message="Job entrypoint command failed\nwith exit code 1")
    assert state.describe() == "Failed (FAILED): AppFailed: Job entrypoint command failed with exit code 1"
    assert found("Complete", "SUCCEEDED", message="Job finished.").describe() == "Complete (SUCCEEDED)"
