"""RunConfig -> RayJob: what follows from the config, written onto the template. Pure; no cluster is asked.

The config travels as an annotation of the head's pod, which the pod sees as a file: no quoting, no second object, and
the RayJob says by itself what it runs.
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from launcher.fitting import refuse, shortage_of_devices
from launcher.planning.cluster import with_its_facts
from launcher.planning.recognition import cluster_of
from launcher.sizing import service_config
from launcher.submit.kubernetes import names, rules, sizes
from launcher.submit.kubernetes.sizes import PodSize
from trainer import config_file
from trainer.config import RunConfig, UserError

CONFIG_PATH = "/etc/broadgauge/run.yaml"
"""Where the template mounts the annotation."""
GPU = "nvidia.com/gpu"
PAGE_PORT, NODE_PORT = 9400, 9401
"""Where the head serves the run's page and metrics, and each machine its own, unless the config says otherwise."""
_PORT_NAME = "broadgauge"
_CLEANING_SECONDS = 15  # beyond its grace, for a driver to end what it has started
_ENDING_SECONDS = 15  # and then for Ray's own processes

_LARGEST_CONFIG_BYTES = 200 * 2**10  # of the 256 KiB that all annotations of an object may have together
_RUN_DIR = re.compile(r"/[A-Za-z0-9._/-]+")  # goes through a shell twice on its way to the driver


@dataclass(frozen=True)
class Where:
    """What the config does not say: where the run lives, in which image, and who admits it."""

    run_dir: str | None = None
    """Folder of the run on the cluster; /runs/NAME if not given."""
    image: str | None = None
    """Of all pods; the overlay's if not given."""
    namespace: str | None = None
    queue: str | None = None
    """A LocalQueue of Kueue; without one, nobody is asked."""
    force: bool = False
    """Whether to go on where memory will not be enough."""


def render(template: Mapping[str, Any], config: RunConfig, where: Where) -> dict[str, Any]:
    """The RayJob of a run.

    Raises:
        UserError: the template cannot hold this run, or breaks a rule that only webhooks and the operator check.
    """
    job: dict[str, Any] = copy.deepcopy(dict(template))
    rules.check_template(job)
    name = names.object_name(config)
    job["metadata"] = _metadata(job.get("metadata", {}), name, config, where)
    config = _reachable(with_its_facts(config))
    run_dir = where.run_dir or f"/runs/{config.name}"
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, worker = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    spec["entrypoint"] = (
        f"broadgauge run {CONFIG_PATH} --run-dir {_checked(run_dir)} --ray auto" + " --force" * where.force
    )
    cluster["rayVersion"] = version("ray")
    worker["replicas"] = worker["minReplicas"] = worker["maxReplicas"] = _num_machines(config)
    with_gpus = wants_gpus(worker["template"], config)
    if with_gpus and not where.force:
        _check_devices(config)
    _fill(head, names.labels(name), sizes.head(config), config, run_dir)
    _fill(worker, names.labels(name), sizes.machine(config, with_gpus), config, run_dir)
    head["template"]["metadata"].setdefault("annotations", {})[names.CONFIG_ANNOTATION] = config_text(config)
    # Ray kills a driver that it was told to stop after 3 s, which is too short to save in.
    _set_env(_container(head["template"]), "RAY_JOB_STOP_WAIT_TIME_S", str(leaving_seconds(config)))
    _set_port(_container(head["template"]), config.monitoring.page_port)
    _set_port(_container(worker["template"]), config.monitoring.node_port)
    submitter = spec["submitterPodTemplate"]
    submitter["metadata"] = names.labelled(submitter.get("metadata"), names.labels(name))
    for pod in (head["template"], worker["template"], submitter):
        _set_image(_container(pod), where.image)
    rules.check(job)
    rules.check_run_dir(job, run_dir)
    return job


def _check_devices(config: RunConfig) -> None:
    """Raises:
    UserError: the cluster that the config names has too little memory on its devices.
    """
    known = cluster_of(config, (), on_gpus=True)
    if known is not None and (short := shortage_of_devices(config, known)) is not None:
        refuse(short)


def _num_machines(config: RunConfig) -> int:
    """All alike: of training, its spares, and the evaluation service.

    Raises:
        UserError: the service wants larger ones.
    """
    machines = config.launch.nodes + config.launch.spares
    if not config.evaluation.has_service:
        return machines
    service = service_config(config)
    if service.ranks_per_node > config.ranks_per_node:
        raise UserError(
            f"the evaluation service has {service.ranks_per_node} ranks on a machine, and machines are those of "
            f"training, with {config.ranks_per_node}; raise evaluation.nodes, or lower evaluation.data"
        )
    return machines + service.launch.nodes


def _reachable(config: RunConfig) -> RunConfig:
    """With endpoints that Prometheus reaches from other pods, unless there are to be none."""
    monitoring = config.monitoring
    if monitoring.listen == "nowhere":
        return config
    ports = {"page_port": monitoring.page_port or PAGE_PORT, "node_port": monitoring.node_port or NODE_PORT}
    return config.model_copy(update={"monitoring": monitoring.model_copy(update={"listen": "network", **ports})})


def config_text(config: RunConfig) -> str:
    """The resolved config, as the driver reads it.

    Raises:
        UserError: it is larger than an annotation may be.
    """
    text = config_file.dump(config)
    size = len(text.encode())
    if size > _LARGEST_CONFIG_BYTES:
        raise UserError(
            f"the config has {size} bytes and travels as an annotation of a pod, which has {_LARGEST_CONFIG_BYTES} at "
            "most; name folders or patterns in data.sources in the place of single files"
        )
    return text


def wants_gpus(machine: Mapping[str, Any], config: RunConfig) -> bool:
    """`launch.device: auto` takes GPUs where the template's machines have some."""
    device = config.launch.device
    return device == "cuda" or (device == "auto" and GPU in _offered(_container(machine)))


def _metadata(metadata: Mapping[str, Any], name: str, config: RunConfig, where: Where) -> dict[str, Any]:
    queue = {names.QUEUE_LABEL: where.queue} if where.queue else {}
    made = names.labelled({**metadata, "name": name}, {**names.labels(name), **queue})
    made["annotations"] = {**made.get("annotations", {}), names.RUN_ANNOTATION: config.name}
    return {**made, "namespace": where.namespace} if where.namespace else made


def _fill(group: dict[str, Any], labels: dict[str, str], need: PodSize, config: RunConfig, run_dir: str) -> None:
    """What head and workers have alike."""
    template = group["template"]
    template["metadata"] = names.labelled(template.get("metadata"), labels)
    group.setdefault("rayStartParams", {})["object-store-memory"] = str(sizes.OBJECT_STORE_BYTES)
    pod, container = template["spec"], _container(template)
    resources = _resources(_offered(container), need, container["name"])
    container["resources"] = {"requests": dict(resources), "limits": dict(resources)}
    for volume in pod["volumes"]:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            volume["emptyDir"]["sizeLimit"] = sizes.quantity(need.shared_memory_bytes)
    _set_grace(pod, config)
    leave = ["python", "-m", "launcher.node.leaving", run_dir, str(leaving_seconds(config))]
    container["lifecycle"] = {**container.get("lifecycle", {}), "preStop": {"exec": {"command": leave}}}


def leaving_seconds(config: RunConfig) -> int:
    """For a driver that is asked to end: to save, within the run's grace, and to clean up."""
    return math.ceil(config.checkpoint.grace_seconds) + _CLEANING_SECONDS


def _set_grace(pod: dict[str, Any], config: RunConfig) -> None:
    """Time for a pod to end in; what the template has is the most that its machines give.

    Raises:
        UserError: the run wants more.
    """
    grace, longest = leaving_seconds(config) + _ENDING_SECONDS, pod.get("terminationGracePeriodSeconds")
    if longest is not None and grace > longest:
        more = _CLEANING_SECONDS + _ENDING_SECONDS
        raise UserError(
            f"checkpoint.grace_seconds {config.checkpoint.grace_seconds:g} and {more} s to end in are more than the "
            f"{longest} s that these machines give; use {longest - more} or less"
        )
    pod["terminationGracePeriodSeconds"] = grace


def _resources(offered: Mapping[str, Any], need: PodSize, container: str) -> dict[str, str]:
    """What a container asks for: all that the template's machine has to give, but of GPUs one a rank.

    Raises:
        UserError: the run needs more.
    """
    needs = {"cpu": need.cpus, "memory": need.memory_bytes, GPU: need.gpus}
    for resource, amount in needs.items():
        has = rules.amount(offered[resource]) if resource in offered else math.inf
        if amount > has:
            shown = sizes.quantity(need.memory_bytes) if resource == "memory" else amount
            raise UserError(
                f"the run needs {resource} {shown} in the container {container}, and the overlay's machines give "
                f"{offered[resource]}; use fewer ranks a machine (launch.nodes), or another overlay"
            )
    own = {"cpu": str(need.cpus), "memory": sizes.quantity(need.memory_bytes)}
    taken = own | {name: str(value) for name, value in offered.items() if name != GPU}
    return taken | ({GPU: str(need.gpus)} if need.gpus else {})


def _offered(container: Mapping[str, Any]) -> dict[str, Any]:
    resources = container.get("resources", {})
    return {**resources.get("requests", {}), **resources.get("limits", {})}


def _container(template: Mapping[str, Any]) -> dict[str, Any]:
    """The first is Ray's, for KubeRay too."""
    container: dict[str, Any] = template["spec"]["containers"][0]
    return container


def _set_image(container: dict[str, Any], image: str | None) -> None:
    if image:
        container["image"] = image
    if "image" not in container:
        raise UserError(f"the container {container['name']} has no image; give --image, or an --overlay that has one")


def _set_env(container: dict[str, Any], name: str, value: str) -> None:
    others = [each for each in container.get("env", []) if each["name"] != name]
    container["env"] = [*others, {"name": name, "value": value}]


def _set_port(container: dict[str, Any], port: int) -> None:
    """By whose name the PodMonitor finds it."""
    others = [each for each in container.get("ports", []) if each.get("name") != _PORT_NAME]
    container["ports"] = [*others, {"name": _PORT_NAME, "containerPort": port}] if port else others


def _checked(run_dir: str) -> str:
    if not _RUN_DIR.fullmatch(run_dir) or ".." in run_dir.split("/"):
        raise UserError(
            f"--run-dir {run_dir} must be an absolute path on the cluster, of letters, digits and ._/- alone"
        )
    return run_dir
