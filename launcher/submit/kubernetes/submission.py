"""Submitting a run to a cluster, as often as one likes: what is to be done is decided first, and then done."""

from collections.abc import Mapping
from typing import Any

from launcher.submit.kubernetes import names
from launcher.submit.kubernetes.cluster import Cluster
from launcher.submit.kubernetes.pace import Pace, Say
from launcher.submit.kubernetes.state import Deed, JobState, decide
from trainer.config import UserError

_LEAVING_SECONDS = 60.0
"""For an ended RayJob to be gone, beyond the grace period of its pods."""


def submit(cluster: Cluster, rayjob: Mapping[str, Any], say: Say, pace: Pace) -> JobState | None:
    """Apply a run's RayJob, unless it has succeeded already (None).

    Two submissions at the same moment apply one RayJob, the later one's.

    Raises:
        UserError: the run is active, the name is another's, the cluster refuses the RayJob, or the one before it does
            not go away.
        Unreachable: the cluster does not answer.
    """
    name, run_name = rayjob["metadata"]["name"], rayjob["metadata"]["annotations"][names.RUN_ANNOTATION]
    found = cluster.find(name)
    deed = decide(found, run_name)
    if deed is Deed.NOTHING:
        say(f"{name} has succeeded already; nothing to do (remove it with --delete to submit it anew)")
        return None
    if deed is Deed.REPLACE:
        assert found is not None
        say(f"{name} is {found.describe()}; it is replaced, and the run goes on from its newest checkpoint")
        if not found.is_leaving:
            cluster.delete(name)
        wait_until_gone(cluster, found, _pod_grace_seconds(rayjob) + _LEAVING_SECONDS, pace)
    made = cluster.apply(rayjob)
    say(f"{name}: submitted to namespace {cluster.namespace}")
    return made


def delete(cluster: Cluster, name: str, run_name: str, say: Say) -> None:
    """Stop a run, which saves first, and remove its RayJob. The run's folder stays.

    Raises:
        UserError: there is none, or it is another's.
        Unreachable: the cluster does not answer.
    """
    found = cluster.find(name)
    if found is None:
        raise UserError(f"there is no RayJob {name} in namespace {cluster.namespace} to delete; look at --namespace")
    if found.run_name != run_name:
        raise UserError(f"the RayJob {name} was not made for the run {run_name}; delete it with kubectl if you mean it")
    cluster.delete(name)
    say(f"{name}: asked to save and end; the run's folder stays")


def wait_until_gone(cluster: Cluster, found: JobState, seconds: float, pace: Pace) -> None:
    """Wait until a RayJob that is being deleted is gone, and with it, by foreground deletion, its pods.

    Raises:
        UserError: it stays.
    """
    deadline = pace.clock() + seconds
    while (now := cluster.find(found.name)) is not None and now.uid == found.uid:
        if pace.clock() > deadline:
            raise UserError(
                f"the RayJob {found.name} has not gone within {seconds:.0f} s of being deleted; see `kubectl describe "
                f"rayjob {found.name}` (is the KubeRay operator running?), and submit again"
            )
        pace.sleep(pace.seconds)


def _pod_grace_seconds(rayjob: Mapping[str, Any]) -> float:
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return max(float(group["template"]["spec"]["terminationGracePeriodSeconds"]) for group in groups)
