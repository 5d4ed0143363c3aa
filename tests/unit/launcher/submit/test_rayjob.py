"""RunConfig -> RayJob: every field that repeats the config follows it, and what cannot run is refused."""

import copy
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kubernetes_tools import OVERLAYS, overlay_template
from launcher import memory
from launcher.fitting import check_memory
from launcher.placement import Machine
from launcher.planning import cluster as clusters
from launcher.submit.kubernetes import names, rules, sizes, template
from launcher.submit.kubernetes.rayjob import CONFIG_PATH, GPU, Where, render
from trainer import config_file
from trainer.config import RunConfig, UserError

HERE = Where(image="made:here")


def config(**sections: Any) -> RunConfig:
    return config_file.from_tree(copy.deepcopy(sections))


def rendered(run: RunConfig, overlay: str | None = None, where: Where = HERE) -> dict[str, Any]:
    return render(overlay_template(overlay), run, where)


def groups(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], worker


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def shared_memory(group: dict[str, Any]) -> str:
    mounts = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
    (volume,) = (each for each in group["template"]["spec"]["volumes"] if each["name"] == mounts["/dev/shm"])
    assert volume["emptyDir"]["medium"] == "Memory"
    return volume["emptyDir"]["sizeLimit"]


runs = st.builds(
    lambda nodes, spares, ranks, threads, device, grace, name, prompt: config(
        name=name,
        parallel={"data": nodes * ranks},
        train={"global_batch_size": nodes * ranks, "micro_batch_size": 1},
        launch={"nodes": nodes, "spares": spares, "threads_per_rank": threads, "device": device},
        checkpoint={"grace_seconds": grace},
        generate={"prompt": prompt},
    ),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 8),
    st.none() | st.integers(1, 16),
    st.sampled_from(["auto", "cpu", "cuda"]),
    st.floats(0.5, 500),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True),
    st.text(min_size=1, max_size=30),
)


def test_the_evaluation_service_has_machines_like_the_others() -> None:
    layout = {"parallel": {"tensor": 4, "data": 2}, "launch": {"nodes": 2, "spares": 1, "device": "cuda"}}
    with_service = config(**layout, evaluation={"where": "service", "nodes": 2, "data": 2})
    _, worker = groups(rendered(with_service))
    assert worker["replicas"] == worker["minReplicas"] == worker["maxReplicas"] == 5
    with pytest.raises(UserError, match=r"the evaluation service has 8 ranks on a machine, .* with 4; raise"):
        rendered(config(**layout, evaluation={"where": "service", "data": 2}))


@settings(max_examples=40)
@given(runs)
def test_every_derived_field_follows_the_config(run: RunConfig) -> None:
    job = rendered(run)
    head, worker = groups(job)
    ranks = run.parallel.num_ranks // run.launch.nodes
    assert [worker[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [
        run.launch.nodes + run.launch.spares
    ] * 3
    limits = container(worker)["resources"]["limits"]
    assert limits == container(worker)["resources"]["requests"]
    assert limits.get(GPU) == (str(ranks) if run.launch.device == "cuda" else None)
    assert int(limits["cpu"]) == ranks * (run.launch.threads_per_rank or 1) + 1
    for group in (head, worker):
        memory, shared = (rules.amount(each) for each in (container(group)["resources"]["limits"]["memory"],
                                                          shared_memory(group)))  # fmt: skip
        assert 0 < sizes.OBJECT_STORE_BYTES < shared < memory
        grace = math.ceil(run.checkpoint.grace_seconds)
        command = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "launcher.node.leaving", f"/runs/{run.name}", str(grace + 15)]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == grace + 30
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(grace + 15)} in container(head)["env"]
    assert job["metadata"]["annotations"][names.RUN_ANNOTATION] == run.name
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert shlex.split(job["spec"]["entrypoint"]) == job["spec"]["entrypoint"].split() == [
        *("broadgauge", "run", CONFIG_PATH, "--run-dir", f"/runs/{run.name}", "--ray", "auto"),
    ]  # fmt: skip


def ports(group: dict[str, Any]) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(group)["ports"]}


@pytest.mark.parametrize(
    ("monitoring", "head_port", "worker_port"),
    [({}, 9400, 9401), ({"page_port": 8000, "node_port": 8001}, 8000, 8001), ({"listen": "nowhere"}, None, None)],
)
def test_prometheus_finds_the_endpoints_that_the_run_serves(
    monitoring: dict[str, Any], head_port: int | None, worker_port: int | None
) -> None:
    head, worker = groups(rendered(config(name="lion", monitoring=monitoring)))
    assert (ports(head).get("broadgauge"), ports(worker).get("broadgauge")) == (head_port, worker_port)
    text = head["template"]["metadata"]["annotations"][names.CONFIG_ANNOTATION]
    served = config_file.from_tree(config_file.parse_yaml(text)).monitoring
    assert served.listen == ("network" if head_port else "nowhere")
    assert (served.page_port or None, served.node_port or None) == (head_port, worker_port)
    monitor = yaml.safe_load((template.MANIFESTS / "base" / "namespace" / "pod-monitor.yaml").read_text())
    assert "broadgauge" in [each["port"] for each in monitor["spec"]["podMetricsEndpoints"]]
    policy = yaml.safe_load((template.MANIFESTS / "base" / "namespace" / "network-policy.yaml").read_text())
    allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    assert {9400, 9401} <= allowed


@settings(max_examples=15)
@given(runs)
def test_the_config_arrives_as_it_was_whatever_is_in_it(run: RunConfig) -> None:
    job = template.only_rayjob(template.dump(rendered(run)), template.MANIFESTS)  # as YAML, there and back
    head, worker = groups(job)
    text = head["template"]["metadata"]["annotations"][names.CONFIG_ANNOTATION]
    arrived = config_file.from_tree(config_file.parse_yaml(text))
    assert arrived.model_copy(update={"monitoring": run.monitoring}) == run
    assert names.CONFIG_ANNOTATION not in worker["template"]["metadata"].get("annotations", {})
    (file,) = (each for each in head["template"]["spec"]["volumes"] if "downwardAPI" in each)
    (item,) = file["downwardAPI"]["items"]
    assert item["fieldRef"]["fieldPath"] == f"metadata.annotations['{names.CONFIG_ANNOTATION}']"
    (mount,) = (each for each in container(head)["volumeMounts"] if each["name"] == file["name"])
    assert f"{mount['mountPath']}/{item['path']}" == CONFIG_PATH


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True))
def test_names_are_labels_of_dns(run_name: str) -> None:
    name = names.object_name(config(name=run_name))
    assert len(name) <= 47 and name[0].isalpha() and name[-1].isalnum()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("run", "name"),
    [("quickstart", "quickstart"), ("GPT-3_175B.v2", "gpt-3-175b-v2"), ("125m", "run-125m"), ("a..b__", "a-b")],
)
def test_names_stay_what_a_person_would_recognise(run: str, name: str) -> None:
    assert names.object_name(config(name=run)) == name


def test_what_the_base_has_besides_stays() -> None:
    base = overlay_template(None)
    before = copy.deepcopy(base)
    job = rendered(config())
    assert base == before  # rendering is pure
    head, _ = groups(job)
    assert head["rayStartParams"] == {
        **before["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"],
        "object-store-memory": str(sizes.OBJECT_STORE_BYTES),
    }
    for key in ("submissionMode", "submitterConfig", "backoffLimit", "preRunningDeadlineSeconds"):
        assert job["spec"][key] == before["spec"][key]
    assert "suspend" not in job["spec"]


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_every_overlay_renders_what_can_run(overlay: str | None) -> None:
    job = rendered(config(), overlay)
    assert list(rules.problems(job)) == []


def test_queue_namespace_image_and_folder_are_those_that_were_given() -> None:
    job = rendered(config(name="big"), where=Where("/runs/team/big", "registry/image:1", "training", "research"))
    assert job["metadata"]["namespace"] == "training"
    assert job["metadata"]["labels"][names.QUEUE_LABEL] == "research"
    assert "--run-dir /runs/team/big " in job["spec"]["entrypoint"]
    pods = [*(group["template"] for group in groups(job)), job["spec"]["submitterPodTemplate"]]
    for pod in pods:
        assert [each["image"] for each in pod["spec"]["containers"]] == ["registry/image:1"]
        assert pod["metadata"]["labels"][names.PART_OF] == "broadgauge"
        assert pod["metadata"]["labels"][names.RUN_LABEL] == "big"
    plain = rendered(config(), "cpu-kind", Where())
    assert "namespace" not in plain["metadata"] and names.QUEUE_LABEL not in plain["metadata"]["labels"]
    assert container(groups(plain)[1])["image"] == "broadgauge:cpu"


def test_a_run_takes_the_machine_whole_but_gpus_one_a_rank() -> None:
    _, worker = groups(rendered(config(parallel={"data": 8}, launch={"nodes": 2}), "h100-ib"))
    assert container(worker)["resources"]["limits"] == {
        "cpu": "96",
        "memory": "1536Gi",
        GPU: "4",
        "rdma/hca_shared_devices_a": "1",
    }
    _, on_cpus = groups(rendered(config(launch={"device": "cpu"}), "h100-ib"))
    assert GPU not in container(on_cpus)["resources"]["limits"]


def test_shared_memory_holds_the_snapshots_of_the_documentation() -> None:
    """docs/checkpoints.md: 12 bytes a parameter, divided by the machines, 2 or 3 times, each once more replicated."""
    model = {"num_layers": 2, "hidden_size": 8192, "num_heads": 64}

    def snapshots(**checkpoint: Any) -> int:
        run = config(model=model, parallel={"data": 2}, launch={"nodes": 2}, checkpoint=checkpoint)
        _, worker = groups(rendered(run))
        assert memory.snapshots_bytes(run) < rules.amount(shared_memory(worker))
        return memory.snapshots_bytes(run)

    once = snapshots() / 2
    # two layers of 12 h^2, tables of 50,304 tokens and 2,048 positions: all but norms and biases
    assert once == pytest.approx(12 * (24 * 8192**2 + (50304 + 2048) * 8192) / 2, rel=1e-3)
    assert snapshots(snapshot_every_steps=50) == 3 * once
    assert snapshots(replicate=True) == 4 * once
    assert snapshots(snapshot_every_steps=50, replicate=True) == 6 * once
    assert snapshots(asynchronous=False) == snapshots(snapshots_in="/tmp/snapshots") == 0


@settings(max_examples=40)
@given(runs)
def test_a_pod_has_the_memory_without_which_the_run_in_it_is_refused(run: RunConfig) -> None:
    """KubeRay tells Ray of a container's limit."""
    run = run.model_copy(update={"launch": run.launch.model_copy(update={"device": "cpu"})})
    _, worker = groups(rendered(run))
    pod = Machine({"CPU": 2.0, "memory": float(rules.amount(container(worker)["resources"]["limits"]["memory"]))})
    check_memory(run, [pod] * (run.launch.nodes + run.launch.spares))


def test_what_a_file_says_of_the_cluster_travels_in_the_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((clusters.FOLDER / "h100.yaml").read_text().replace("H100 80GB SXM", "mine"))
    head, _ = groups(rendered(config(launch={"cluster": str(path)})))
    sent = config_file.from_tree(yaml.safe_load(head["template"]["metadata"]["annotations"][names.CONFIG_ANNOTATION]))
    path.unlink()
    assert isinstance(sent.launch.cluster, dict)
    assert clusters.load(sent.launch.cluster) == clusters.load("h100").model_copy(update={"device": "mine"})
    assert clusters.with_its_facts(sent) == sent  # as when it is submitted again
    by_name = config(launch={"cluster": "h100"})
    assert clusters.with_its_facts(by_name) == by_name
    with pytest.raises(UserError, match="No such file"):
        rendered(config(launch={"cluster": str(path)}))


def test_devices_that_cannot_hold_the_run_are_refused_before_they_are_asked_for() -> None:
    large = {"preset": "gpt3_13b", "launch": {"device": "cuda", "cluster": "h100"}}
    with pytest.raises(UserError, match=r"the fullest rank takes .* GiB .*, and each H100 .*--force goes on all the"):
        rendered(config(**large))
    forced = rendered(config(**large), where=Where(image="made:here", force=True))
    assert forced["spec"]["entrypoint"].endswith(" --ray auto --force")
    rendered(config(**large | {"launch": {"device": "cuda"}}))  # of which nothing is known


def test_memory_of_cpu_ranks_grows_with_what_they_hold() -> None:
    def memory(**sections: Any) -> Any:
        _, worker = groups(rendered(config(model={"num_layers": 24, "hidden_size": 2048, "num_heads": 16}, **sections)))
        return rules.amount(container(worker)["resources"]["limits"]["memory"])

    alone = memory(launch={"device": "cpu"})
    assert memory(launch={"device": "cpu"}, train={"micro_batch_size": 8}) > alone
    assert memory(launch={"device": "cpu"}, parallel={"data": 2}) > alone
    assert memory(launch={"device": "cuda"}) < alone


REFUSED = {
    "long name": ({"name": "x" * 48}, None, HERE, ["48 characters", "47 at most", "x" * 47]),
    "no image": ({}, None, Where(), ["no image", "--image"]),
    "relative folder": ({}, None, Where("runs/x", "i"), ["--run-dir runs/x", "absolute"]),
    "folder for a shell": ({}, None, Where("/runs/$(id)", "i"), ["letters, digits"]),
    "folder above": ({}, None, Where("/runs/../etc", "i"), ["letters, digits"]),
    "folder lost with its pod": ({}, None, Where("/tmp/run", "i"), ["no volume that outlives", "/runs"]),
    "folder beside the volume": ({}, None, Where("/runsx/run", "i"), ["no volume that outlives"]),
    "gpus": ({"parallel": {"data": 16}}, "h100-ib", HERE, [f"needs {GPU} 16", "give 8", "launch.nodes"]),
    "cpus": ({"launch": {"threads_per_rank": 96}}, "h100-ib", HERE, ["needs cpu 97", "give 96"]),
    "memory": (
        {"preset": "gpt3_175b", "launch": {"device": "cuda"}},
        "h100-ib", HERE, ["needs memory", "1536Gi"],
    ),
    "grace": ({"checkpoint": {"grace_seconds": 100}}, "spot", HERE, ["grace_seconds 100", "120 s", "use 90 or less"]),
    "large config": (
        {"data": {"sources": [f"/data/corpus/part-{n:06}.jsonl.zst" for n in range(8000)]}},
        None, HERE, ["annotation", "patterns in data.sources"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "overlay", "where", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_in_one_line(
    tree: dict[str, Any], overlay: str | None, where: Where, said: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        rendered(config(**tree), overlay, where)
    assert all(part in str(refusal.value) for part in said) and "\n" not in str(refusal.value)


def broken(job: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at `a.b.0.c`; None removes it."""
    changed = copy.deepcopy(job)
    *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
    place: Any = changed
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


CLUSTER = "spec.rayClusterSpec"
WORKER = f"{CLUSTER}.workerGroupSpecs.0"
BROKEN = {
    "upper case": ("metadata.name", "Run", "DNS label"),
    "digit first": ("metadata.name", "1run", "DNS label"),
    "48 characters": ("metadata.name", "r" * 48, "at most 47"),
    "suspend": ("spec.suspend", False, "Kueue's"),
    "suspended cluster": (f"{CLUSTER}.suspend", True, "Kueue's"),
    "http": ("spec.submissionMode", "HTTPMode", "K8sJobMode"),
    "sidecar": ("spec.submissionMode", "SidecarMode", "K8sJobMode"),
    "cluster stays": ("spec.shutdownAfterJobFinishes", False, "must be true"),
    "cluster stays by default": ("spec.shutdownAfterJobFinishes", None, "must be true"),
    "submitted twice": ("spec.submitterConfig.backoffLimit", 2, "submitted twice"),
    "cluster of others": ("spec.clusterSelector", {"ray.io/cluster": "x"}, "clusterSelector is set"),
    "driver elsewhere": ("spec.entrypointNumCpus", 1, "driver on the head"),
    "autoscaling": (f"{CLUSTER}.enableInTreeAutoscaling", True, "all or none"),
    "no token": (f"{CLUSTER}.authOptions.mode", "disabled", "must be token"),
    "no authentication": (f"{CLUSTER}.authOptions", None, "must be token"),
    "ranks on the head": (f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", "4", 'num-cpus: "0"'),
    "fewer will do": (f"{WORKER}.minReplicas", 0, "all or none"),
    "several hosts": (f"{WORKER}.numOfHosts", 2, "a replica is one machine"),
    "bursting": (f"{WORKER}.template.spec.containers.0.resources.requests", {"cpu": "1"}, "equal"),
    "no limits": (f"{CLUSTER}.headGroupSpec.template.spec.containers.0.resources", {}, "equal"),
}


@pytest.mark.parametrize(("path", "value", "said"), BROKEN.values(), ids=BROKEN)
def test_what_only_webhooks_and_the_operator_refuse_is_refused_here(path: str, value: Any, said: str) -> None:
    job = broken(rendered(config()), path, value)
    (problem,) = rules.problems(job)
    assert said in problem
    with pytest.raises(UserError, match="none that can run"):
        rules.check(job)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.suspend", True),
        ("spec.submissionMode", "HTTPMode"),
        (f"{CLUSTER}.authOptions.mode", "disabled"),
        (f"{CLUSTER}.workerGroupSpecs", []),
        ("spec.submitterPodTemplate", None),
        (f"{WORKER}.template.spec.volumes", None),
    ],
)
def test_an_overlay_that_breaks_a_rule_is_refused(path: str, value: Any) -> None:
    with pytest.raises(UserError):
        render(broken(overlay_template(None), path, value), config(), HERE)


@pytest.mark.parametrize(
    ("quantity", "number"),
    [("8", 8), (96, 96), ("500m", 0.5), ("1536Gi", 1536 * 2**30), ("2Ti", 2**41), ("1.5k", 1500), ("3Ki", 3072)],
)
def test_quantities_are_read_as_kubernetes_does(quantity: object, number: float) -> None:
    assert rules.amount(quantity) == number


def test_an_overlay_is_a_name_or_a_folder(tmp_path: Any) -> None:
    assert template.find("spot") == template.MANIFESTS / "overlays" / "spot" / "rayjob"
    own = tmp_path / "own"
    (own / "rayjob").mkdir(parents=True)
    (own / "rayjob" / "kustomization.yaml").write_text("resources: [rayjob.yaml]\n")
    job = template.MANIFESTS / "base" / "rayjob" / "rayjob.yaml"
    (own / "rayjob" / "rayjob.yaml").write_text(job.read_text().replace("backoffLimit: 3", "backoffLimit: 7"))
    assert template.load(str(own))["spec"]["backoffLimit"] == 7
    with pytest.raises(UserError, match=r"nowhere is neither .* one of cpu-kind, h100-ib, spot"):
        template.find("nowhere")
    (own / "rayjob" / "rayjob.yaml").write_text("kind: [")
    with pytest.raises(UserError, match=r"kubectl kustomize .* failed"):
        template.load(str(own))
    with pytest.raises(UserError, match="holds 2 RayJobs"):
        template.only_rayjob("kind: RayJob\n---\nkind: RayJob\n", tmp_path)
