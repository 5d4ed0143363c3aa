"""A Kubernetes cluster and the RayJobs in one of its namespaces: the only place that imports lightkube.

Whatever a cluster answers that a person can mend becomes a `UserError`; a cluster that cannot be reached just now is
`Unreachable`, which whoever waits may pass over.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
from lightkube import ApiError, Client, KubeConfig
from lightkube.core.exceptions import ConfigError
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Pod
from lightkube.types import CascadeType, PatchType

from launcher.submit.kubernetes import names
from launcher.submit.kubernetes.state import JobState
from trainer.config import UserError

FIELD_MANAGER = names.US
_ANSWER_SECONDS = 10.0

RayJob = create_namespaced_resource("ray.io", "v1", "RayJob", "rayjobs")


class Unreachable(ConnectionError):
    """The cluster does not answer, or is not itself."""


class Cluster:
    """RayJobs of one namespace."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client, self.namespace = client, namespace

    def find(self, name: str) -> JobState | None:
        """What the RayJob of a name is at; None if there is none.

        Raises:
            UserError: this may not be looked at, or the cluster knows no RayJobs.
            Unreachable: it does not answer.
        """
        with _in_words(f"rayjob {name}"):
            try:
                return JobState.of(self._client.get(RayJob, name, namespace=self.namespace))
            except httpx2.HTTPStatusError as error:
                if error.response.status_code != 404:
                    raise
                details = error.status.details if isinstance(error, ApiError) else None
                if details is None or details.name != name:  # not the object is missing, but the whole kind
                    raise UserError("the cluster has no RayJobs; install the KubeRay operator in it") from error
                return None

    def apply(self, rayjob: Mapping[str, Any]) -> JobState:
        """Server-side apply, as a field manager of our own: fields of others stay theirs.

        Raises:
            UserError: the cluster refuses it, or a field of it is somebody else's.
            Unreachable: it does not answer.
        """
        name = rayjob["metadata"]["name"]
        with _in_words(f"rayjob {name}"):
            made = self._client.patch(
                RayJob,
                name,
                dict(rayjob),
                namespace=self.namespace,
                patch_type=PatchType.APPLY,
                field_manager=FIELD_MANAGER,
            )
        return JobState.of(made)

    def delete(self, name: str) -> None:
        """Ask for the end of a RayJob; it is gone when its pods are. One that is gone already is no error.

        Raises:
            UserError: this may not be done.
            Unreachable: the cluster does not answer.
        """
        with _in_words(f"rayjob {name}"):
            try:
                self._client.delete(RayJob, name, namespace=self.namespace, cascade=CascadeType.FOREGROUND)
            except httpx2.HTTPStatusError as error:
                if error.response.status_code != 404:
                    raise

    def submitter_pods(self, name: str) -> list[str]:
        """Pods whose log is that of the driver, oldest first; one for every cluster that the RayJob has had.

        Raises:
            UserError: this may not be looked at, or the cluster has no pods.
            Unreachable: it does not answer.
        """
        with _in_words("pods"):
            pods = list(self._client.list(Pod, namespace=self.namespace, labels={"job-name": name}))
        described = [pod.metadata or ObjectMeta() for pod in pods]
        return [each.name or "" for each in sorted(described, key=lambda each: str(each.creationTimestamp))]

    def log(self, pod: str, since_seconds: int | None = None) -> Iterator[str]:
        """Lines of a pod's log, as they are written, until its container ends: all, or those of the last seconds.

        Raises:
            UserError: this may not be looked at.
            Unreachable: the pod has not started yet, or the cluster does not answer.
        """
        with _in_words(f"the log of pod {pod}"):
            yield from self._client.log(pod, namespace=self.namespace, follow=True, newlines=False, since=since_seconds)


@contextmanager
def connected(context: str | None = None, namespace: str | None = None) -> Iterator[Cluster]:
    """The cluster of a context of the kubeconfig (KUBECONFIG, or ~/.kube/config), or the one that this pod is in.

    Raises:
        UserError: there is no such context, or no kubeconfig.
    """
    try:
        chosen = (_kubeconfig() if context else KubeConfig.from_env()).get(context)
    except (ConfigError, KeyError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"no Kubernetes cluster to submit to ({reason}); give --context, or set KUBECONFIG") from error
    assert chosen is not None
    timeout = httpx2.Timeout(_ANSWER_SECONDS)
    with Client(chosen, timeout=timeout, field_manager=FIELD_MANAGER) as client:
        yield Cluster(client, namespace or chosen.namespace)


def _kubeconfig() -> KubeConfig:
    return KubeConfig.from_file(os.environ.get("KUBECONFIG", "~/.kube/config"))


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """The cluster's errors as ours."""
    try:
        yield
    except httpx2.HTTPStatusError as error:
        raise _as_ours(error, what) from error
    except (httpx2.HTTPError, ConfigError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreachable(f"the cluster does not answer: {reason}") from error


def _as_ours(error: httpx2.HTTPStatusError, what: str) -> Exception:
    code, message = error.response.status_code, " ".join(str(error).split())
    conflicts = _conflicts(error) if isinstance(error, ApiError) else []
    if conflicts:
        return UserError(
            f"{what}: {', '.join(conflicts)} is set by another ({message}); leave the field to its manager, and take "
            "it out of the overlay"
        )
    if "typed patch object" in message:  # a server's 500 for a field that is not in its schema
        return UserError(f"{what}: {message}; the cluster's KubeRay is older than the template, or the overlay wrong")
    if code == 429 or code >= 500:
        return Unreachable(f"{what}: {message}")
    if code == 404:
        return UserError(f"{what}: there is no such thing on the cluster")
    if code in (401, 403):
        return UserError(f"{what}: {message}; bind the role broadgauge-submitter of k8s/base/namespace to you")
    return UserError(f"{what}: the cluster refuses it: {message}; mend the config or the overlay")


def _conflicts(error: ApiError) -> list[str]:
    """Fields that belong to other managers."""
    causes = (error.status.details and error.status.details.causes) or []
    return [str(cause.field) for cause in causes if cause.reason == "FieldManagerConflict"]
