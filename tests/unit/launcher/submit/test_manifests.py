"""What lies in k8s/ is what a cluster takes, and what the pages say of it."""

from pathlib import Path
from typing import Any

import pytest
from lightkube import codecs

from kubernetes_tools import OVERLAYS, ROOT, kinds, kustomized, overlay_template, validate
from launcher.submit.kubernetes.rayjob import Where, render
from trainer import config_file

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FOLDERS = [
    f"{where}/{part}"
    for where in ("base", *(f"overlays/{overlay}" for overlay in OVERLAYS))
    for part in ("cluster", "namespace")
]


def one(folder: str, kind: str) -> dict[str, Any]:
    (found,) = (each for each in kustomized(folder) if each["kind"] == kind)
    return found


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_on_every_overlay_is_a_rayjob_by_its_schema(path: Path, overlay: str | None) -> None:
    validate(render(overlay_template(overlay), config_file.load(path), Where(image="made:here", queue="research")))


def test_the_check_by_schema_sees_a_field_that_is_not_there() -> None:
    job = render(overlay_template(None), config_file.load(CONFIGS[-1]), Where(image="made:here"))
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["readOnlyRootFilesystem"] = True
    with pytest.raises(Exception, match="readOnlyRootFilesystem"):
        validate(job)


@pytest.mark.parametrize("folder", FOLDERS)
def test_queues_and_monitors_are_by_their_schemas(folder: str) -> None:
    custom = [each for each in kustomized(folder) if {"kueue", "monitoring"} & set(each["apiVersion"].split("."))]
    for manifest in custom:
        if manifest["kind"] != "Topology":  # Kueue's, whose CRD is not among those that tests are given
            validate(manifest)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kinds_of_kubernetes_itself_have_no_unknown_field(folder: str) -> None:
    """Models made from Kubernetes' OpenAPI drop what they do not know."""
    own = [each for each in kustomized(folder) if not {"kueue", "monitoring"} & set(each["apiVersion"].split("."))]
    assert own
    for manifest in own:
        assert codecs.from_dict(manifest).to_dict() == manifest, manifest["kind"]


def test_a_namespace_has_what_runs_need() -> None:
    needed = {"Namespace", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "PersistentVolumeClaim"}
    assert set(kinds(kustomized("base/namespace"))) == needed | {"LocalQueue", "PodMonitor"}
    assert set(kinds(kustomized("overlays/cpu-kind/namespace"))) == needed
    assert list(kinds(kustomized("overlays/cpu-kind/cluster"))) == ["PriorityClass"]


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_pods_fit_the_restricted_standard_of_their_namespace(overlay: str | None) -> None:
    """The rules of Kubernetes' "restricted" pod security standard, which the namespace enforces, and more."""
    assert (
        one("base/namespace", "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )
    spec = overlay_template(overlay)["spec"]
    cluster = spec["rayClusterSpec"]
    pods = [
        spec["submitterPodTemplate"]["spec"],
        *(group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])),
    ]
    for pod in pods:
        person = pod["securityContext"]
        assert person["runAsNonRoot"] and person["runAsUser"] != 0
        assert person["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False and pod["serviceAccountName"] == "broadgauge"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all(not {"hostPath"} & volume.keys() for volume in pod["volumes"])
        for container in pod["containers"]:
            sealed = container["securityContext"]
            assert sealed["capabilities"] == {"drop": ["ALL"]} and sealed["allowPrivilegeEscalation"] is False
            assert sealed["readOnlyRootFilesystem"] is True
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            by_name = {volume["name"]: volume for volume in pod["volumes"]}
            assert "emptyDir" in by_name[mounts["/tmp"]]
            assert {"name": "HOME", "value": "/tmp"} in container["env"]


def test_who_submits_may_do_no_more_than_it_takes() -> None:
    rules = one("base/namespace", "Role")["rules"]
    assert {(group, resource, verb) for rule in rules for group in rule["apiGroups"]
            for resource in rule["resources"] for verb in rule["verbs"]} == {
        *(("ray.io", "rayjobs", verb) for verb in ("get", "create", "patch", "delete")),
        ("", "pods", "list"),
        ("", "pods/log", "get"),
    }  # fmt: skip


@pytest.mark.parametrize("overlay", ["h100-ib", "spot"])
def test_a_queue_has_quota_for_everything_that_its_pods_ask_for(overlay: str) -> None:
    queue = one(f"overlays/{overlay}/cluster", "ClusterQueue")
    flavors = {
        each["metadata"]["name"] for each in kustomized(f"overlays/{overlay}/cluster") if "Flavor" in each["kind"]
    }
    (group,) = queue["spec"]["resourceGroups"]
    config = config_file.override({"parallel": {"data": 8}, "launch": {"device": "auto"}}, [])
    cluster = render(overlay_template(overlay), config, Where(image="made:here"))["spec"]["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"]
    assert worker["template"]["spec"]["containers"][0]["resources"]["limits"].keys() <= set(group["coveredResources"])
    assert {flavor["name"] for flavor in group["flavors"]} == flavors
    for flavor in group["flavors"]:
        assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]


def test_levels_of_the_topology_are_those_that_pods_name() -> None:
    topology = one("overlays/h100-ib/cluster", "Topology")
    flavors = [each["spec"] for each in kustomized("overlays/h100-ib/cluster") if each["kind"] == "ResourceFlavor"]
    levels = [level["nodeLabel"] for level in topology["spec"]["levels"]]
    (worker,) = overlay_template("h100-ib")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    wanted = worker["template"]["metadata"]["annotations"]["kueue.x-k8s.io/podset-preferred-topology"]
    assert wanted in levels and levels[-1] == "kubernetes.io/hostname"
    assert topology["metadata"]["name"] in [flavor.get("topologyName") for flavor in flavors]
