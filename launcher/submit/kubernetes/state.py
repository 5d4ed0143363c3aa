"""What a cluster says of a run's RayJob, and what submitting the run once more is to do about it. No cluster here."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from launcher.submit.kubernetes import names
from trainer.config import UserError

_OVER = {"Complete", "Failed", "ValidationFailed"}  # with retries to come, KubeRay says Retrying and not Failed


class Deed(Enum):
    """What a submission does."""

    CREATE = "create"
    REPLACE = "replace"
    """Delete the ended RayJob, wait until its pods are gone, create a new one: the run goes on from its checkpoint."""
    NOTHING = "nothing"


@dataclass(frozen=True)
class JobState:
    """A RayJob at one moment."""

    name: str
    run_name: str | None
    """The run it is for; None if it was not made here."""
    deployment: str
    """status.jobDeploymentStatus of KubeRay; empty before the operator has seen it."""
    job: str
    """status.jobStatus: Ray's own word on the driver."""
    reason: str
    message: str
    num_failed: int
    """Clusters that have been lost or given up so far."""
    queue: str | None
    is_suspended: bool
    is_leaving: bool
    uid: str

    @classmethod
    def of(cls, rayjob: Mapping[str, Any]) -> "JobState":
        metadata, status = rayjob["metadata"], rayjob.get("status") or {}
        labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
        return cls(
            name=metadata["name"],
            run_name=annotations.get(names.RUN_ANNOTATION) if labels.get(names.MANAGED_BY) == names.US else None,
            deployment=status.get("jobDeploymentStatus", ""),
            job=status.get("jobStatus", ""),
            reason=status.get("reason", ""),
            message=" ".join(status.get("message", "").split()),
            num_failed=status.get("failed") or 0,
            queue=labels.get(names.QUEUE_LABEL),
            is_suspended=bool(rayjob.get("spec", {}).get("suspend")),
            is_leaving="deletionTimestamp" in metadata,
            uid=metadata.get("uid", ""),
        )

    @property
    def is_over(self) -> bool:
        return self.deployment in _OVER

    @property
    def has_succeeded(self) -> bool:
        return self.deployment == "Complete" and self.job == "SUCCEEDED"

    @property
    def was_stopped(self) -> bool:
        return self.deployment == "Complete" and self.job == "STOPPED"

    @property
    def is_parked(self) -> bool:
        """Suspended by a person: Kueue would admit what it holds back by itself."""
        return self.deployment == "Suspended" and self.is_suspended and self.queue is None

    def describe(self) -> str:
        """'Running (RUNNING)', 'waiting in queue research', 'Failed: AppFailed: ...': for a person, on one line."""
        if self.is_suspended and not self.is_over and self.queue:
            return f"waiting in queue {self.queue}"
        after = f", after {self.num_failed} lost" if self.num_failed and not self.is_over else ""
        job = f" ({self.job})" if self.job else ""
        why = "".join(f": {part}" for part in (self.reason, self.message) if part and not self.has_succeeded)
        return f"{self.deployment or 'not yet seen by the operator'}{job}{after}{why}"


def decide(found: JobState | None, run_name: str) -> Deed:
    """What submitting a run does where `found` has its name already.

    Raises:
        UserError: it belongs to another, or it is active.
    """
    if found is None:
        return Deed.CREATE
    if found.run_name != run_name:
        whose = f"the run {found.run_name}" if found.run_name else "somebody else"
        raise UserError(f"the RayJob {found.name} is there already and belongs to {whose}; give this run another name")
    if found.is_leaving or found.is_parked:
        return Deed.REPLACE
    if found.has_succeeded:
        return Deed.NOTHING
    if found.is_over:
        return Deed.REPLACE
    raise UserError(
        f"the run {run_name} is active: its RayJob {found.name} is {found.describe()}; wait for it, or stop it with "
        "--delete"
    )
