"""What a schema does not say of a RayJob, and the operator's and Kueue's webhooks would refuse, or the run would miss.

Sources: KubeRay's `ValidateRayJobSpec`, Kueue's webhook of RayJobs, and what this package relies on.
"""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from trainer.config import UserError

_SUFFIXES = {"": Decimal(1), "m": Decimal("0.001")} | {
    f"{letter}{binary}": Decimal(base**power)
    for power, letter in enumerate("kMGTP", 1)
    for base, binary in ((1000, ""), (1024, "i"))
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTP]|[KMGTP]i)?")
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # RFC 1035, and KubeRay's 47 characters


def check_template(job: Mapping[str, Any]) -> None:
    """That a template has the parts that a run fills in.

    Raises:
        UserError: names the part.
    """
    spec = job.get("spec", {})
    cluster = spec.get("rayClusterSpec", {})
    groups = cluster.get("workerGroupSpecs") or []
    if len(groups) != 1:
        raise UserError(f"the template has {len(groups)} worker groups, and the machines of a run are 1; leave one")
    for place, template in (
        ("headGroupSpec", cluster.get("headGroupSpec", {}).get("template")),
        ("workerGroupSpecs[0]", groups[0].get("template")),
        ("submitterPodTemplate", spec.get("submitterPodTemplate")),
    ):
        pod = (template or {}).get("spec", {})
        if not (pod.get("containers") and pod.get("volumes")):
            raise UserError(f"the template's {place} has no container or no volumes; start from k8s/base/rayjob")


def check(job: Mapping[str, Any]) -> None:
    """Refuse a RayJob that would be refused, or would not run, for reasons that its schema does not hold.

    Raises:
        UserError: the first of them.
    """
    for problem in problems(job):
        raise UserError(f"the RayJob {job['metadata']['name']} is none that can run: {problem}")


def problems(job: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong, each with what to do."""
    spec, cluster, name = job["spec"], job["spec"]["rayClusterSpec"], job["metadata"]["name"]
    if not _LABEL.fullmatch(name):
        yield f"its name must be a DNS label of at most 47 characters, and is {name!r}"
    if "suspend" in spec or "suspend" in cluster:
        yield "suspend is set, and that field is Kueue's; remove it from the overlay"
    if spec.get("submissionMode") != "K8sJobMode":
        yield f"submissionMode is {spec.get('submissionMode')}, and a run needs K8sJobMode, whose pod has the logs"
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield "shutdownAfterJobFinishes must be true, or an ended run would keep its machines and its quota"
    if spec.get("submitterConfig", {}).get("backoffLimit") != 0:
        yield "submitterConfig.backoffLimit must be 0, or a run might be submitted twice"
    for forbidden in ("clusterSelector", "jobId", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources"):
        if forbidden in spec:
            yield f"{forbidden} is set; remove it: a run has a cluster of its own and its driver on the head"
    if cluster.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling is true, and a run's machines are all or none; set it to false"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode must be token, or whoever reaches the head may run code on all machines"
    yield from _problems_of_groups(cluster)


def _problems_of_groups(cluster: Mapping[str, Any]) -> Iterator[str]:
    head, (worker,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'the head\'s rayStartParams need num-cpus: "0", or ranks might be placed there'
    if len({worker.get(key) for key in ("replicas", "minReplicas", "maxReplicas")}) != 1:
        yield "replicas, minReplicas and maxReplicas differ, and a run's machines are all or none"
    if worker.get("numOfHosts", 1) != 1:
        yield "numOfHosts is not 1, and a replica is one machine; remove it"
    for group in (head, worker):
        for container in group["template"]["spec"]["containers"]:
            resources = container.get("resources", {})
            if resources.get("requests") != resources.get("limits") or not resources.get("limits"):
                yield f"requests and limits of the container {container['name']} must be there and equal"


def check_run_dir(job: Mapping[str, Any], run_dir: str) -> None:
    """That the run's folder lies on a volume that head and workers share, and that outlives them.

    Raises:
        UserError: it does not.
    """
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        lasting = list(_lasting_mounts(group["template"]["spec"]))
        if not any(f"{run_dir}/".startswith(f"{mount.rstrip('/')}/") for mount in lasting):
            raise UserError(
                f"--run-dir {run_dir} is on no volume that outlives the pods, and would be lost with them; use one in "
                f"{' or '.join(lasting) or 'a volume of the overlay'}"
            )


def _lasting_mounts(pod: Mapping[str, Any]) -> Iterator[str]:
    passing = {"emptyDir", "downwardAPI", "configMap", "secret", "projected"}
    lasting = {volume["name"] for volume in pod["volumes"] if not passing & volume.keys()}
    for mount in pod["containers"][0].get("volumeMounts", []):
        if mount["name"] in lasting and not mount.get("readOnly"):
            yield mount["mountPath"]


def amount(quantity: object) -> Decimal:
    """A quantity of Kubernetes as a number: 1536Gi, 500m, 8.

    Raises:
        UserError: it is none.
    """
    match = _QUANTITY.fullmatch(str(quantity))
    if match is None:
        raise UserError(f"{quantity!r} is no quantity such as 96, 500m or 1536Gi")
    return Decimal(match[1]) * _SUFFIXES[(match[2] or "").replace("K", "k")]
