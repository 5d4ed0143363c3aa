"""`broadgauge submit --to k8s` against a real API server. There is no operator: the tests write what KubeRay would."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightkube import ApiError, Client, KubeConfig, codecs
from lightkube.generic_resource import create_global_resource, create_namespaced_resource
from lightkube.types import PatchType

from kubernetes_tools import OVERLAYS, ApiServer, api_server, kustomized, overlay_template
from launcher.cli.main import main
from launcher.submit.kubernetes.cluster import FIELD_MANAGER, Cluster, RayJob
from launcher.submit.kubernetes.pace import Pace
from launcher.submit.kubernetes.rayjob import Where, render
from small_run import write_config
from trainer import config_file
from trainer.config import UserError

DEADLINE_SECONDS = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    crds = ("ray.io_rayjobs.yaml", "kueue-localqueues.yaml", "kueue-clusterqueues.yaml", "kueue-resourceflavors.yaml")
    running = api_server(tmp_path_factory.mktemp("api"), *crds, "podmonitors.yaml")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


class Operator:
    """KubeRay, Kueue and the garbage collector, as far as a test needs them, for one RayJob."""

    def __init__(self, server: ApiServer, name: str, namespace: str) -> None:
        self.client = Client(
            KubeConfig.from_file(server.kubeconfig), namespace=namespace, field_manager="kuberay-operator"
        )
        self.name, self.namespace = name, namespace

    def job(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self.client.get(RayJob, self.name)
        except ApiError as error:
            assert error.status.code == 404
            return None
        return found

    def report(self, deployment: str, job: str = "", **more: Any) -> None:
        status = {"jobDeploymentStatus": deployment, "jobStatus": job, **more}
        self.client.patch(RayJob.Status, self.name, {"status": status}, patch_type=PatchType.MERGE)

    def collect(self) -> None:
        """What the garbage collector does when the pods of a deleted RayJob are gone."""
        self.client.patch(RayJob, self.name, {"metadata": {"finalizers": None}}, patch_type=PatchType.MERGE)

    def act(self, *deeds: Callable[[], object]) -> None:
        """One after the other, as soon as there is a RayJob."""
        wait_for(lambda: self.job() is not None)
        for deed in deeds:
            deed()


@pytest.fixture
def operator(server: ApiServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    """In a namespace of the test's own."""
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    made = Operator(server, "small", f"n-{abs(hash(request.node.name)):x}")
    with made.client:
        yield made


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def meanwhile(deed: Callable[[], None]) -> Iterator[None]:
    """Do it in a thread; what fails there fails the test."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            deed()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive() and not failed, failed


Outcome = tuple[int | str | None, str, str]
Submit = Callable[..., Outcome]


@pytest.fixture
def submit(
    operator: Operator, config_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Submit:
    """Run the command in this process, which asks the server more often: exit code, output, errors."""
    monkeypatch.setattr("launcher.submit.kubernetes.pace.Pace", partial(Pace, seconds=0.1))

    def run(*options: str) -> Outcome:
        arguments = [
            "submit",
            str(config_path),
            "--to",
            "k8s",
            "--namespace",
            operator.namespace,
            "--image",
            "made:here",
        ]
        with pytest.raises(SystemExit) as end:
            main([*arguments, *options])
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_a_server_takes_every_overlay_and_knows_who_set_what(
    submit: Submit, operator: Operator, overlay: str | None, config_path: Path
) -> None:
    if overlay:
        kustomized(f"overlays/{overlay}/rayjob")  # skips without kubectl
    options = ["--overlay", overlay] if overlay else []
    code, out, err = submit("--no-follow", "--queue", "research", *options)
    assert (code, err) == (0, "") and f"small: submitted to namespace {operator.namespace}" in out
    found = operator.job()
    assert found is not None
    where = Where(None, "made:here", operator.namespace, "research")
    sent = render(overlay_template(overlay), config_file.load(config_path), where)
    assert found["metadata"]["labels"] == sent["metadata"]["labels"]
    assert contains(found["spec"], sent["spec"]), "the server changed what it was sent"
    owners = {(each["manager"], each["operation"]) for each in found["metadata"]["managedFields"]}
    assert owners == {(FIELD_MANAGER, "Apply")}


def contains(whole: Any, part: Any) -> bool:
    """A server adds defaults, and takes nothing away."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


def test_a_dry_run_prints_what_would_be_applied_and_asks_nobody(
    submit: Submit, operator: Operator, monkeypatch: pytest.MonkeyPatch, config_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    code, out, err = submit("--dry-run", "--set", "launch.device=cpu", "checkpoint.grace_seconds=5")
    assert (code, err) == (0, "") and operator.job() is None
    run = config_file.load(config_path, ["launch.device=cpu", "checkpoint.grace_seconds=5"])
    assert yaml.safe_load(out) == render(overlay_template(None), run, Where(None, "made:here", operator.namespace))


def test_a_run_is_followed_to_its_success_and_then_left_alone(submit: Submit, operator: Operator) -> None:
    def succeed() -> None:
        operator.act(
            lambda: operator.report("Initializing"),
            lambda: operator.report("Complete", "SUCCEEDED", message="Job finished successfully."),
        )

    with meanwhile(succeed):
        code, out, err = submit()
    assert (code, err) == (0, "")
    assert "no log to show, only the state: pods: there is no such thing on the cluster" in out
    assert out.rstrip().endswith("small: Complete (SUCCEEDED)")
    before = operator.job()
    code, out, err = submit()
    assert code == 0 and "has succeeded already; nothing to do" in out and operator.job() == before


def test_a_run_that_fails_is_replaced_by_the_next_submission(submit: Submit, operator: Operator) -> None:
    def fail() -> None:
        operator.act(lambda: operator.report("Failed", "FAILED", reason="AppFailed", message="exit code 1", failed=4))

    with meanwhile(fail):
        code, _, err = submit()
    assert code == 1
    assert "failed: RunFailed: small is Failed (FAILED): AppFailed: exit code 1; submitting it again goes on" in err
    first = operator.job()
    assert first is not None

    def collect() -> None:
        wait_for(lambda: "deletionTimestamp" in (operator.job() or first)["metadata"])
        operator.collect()

    with meanwhile(collect):
        code, out, _ = submit("--no-follow", "--set", "checkpoint.keep_last=5")
    assert code == 0 and "small is Failed (FAILED): AppFailed: exit code 1; it is replaced" in out
    second = operator.job()
    assert second is not None and second["metadata"]["uid"] != first["metadata"]["uid"]
    assert second.get("status", {}).get("jobDeploymentStatus") is None
    head = second["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]
    assert "keep_last: 5" in head["annotations"]["broadgauge/config"]


def test_a_run_that_is_active_is_left_alone(submit: Submit, operator: Operator) -> None:
    assert submit("--no-follow")[0] == 0
    for deployment, job, said in (("", "", "not yet seen"), ("Running", "RUNNING", "Running (RUNNING)")):
        if deployment:
            operator.report(deployment, job)
        before = operator.job()
        code, _, err = submit("--no-follow", "--set", "seed=7")
        assert code == 2 and len(err.splitlines()) == 1
        assert f"the run small is active: its RayJob small is {said}" in err and "stop it with --delete" in err
        assert operator.job() == before


def test_suspend_stays_with_kueue(submit: Submit, operator: Operator, config_path: Path) -> None:
    """As its webhook and its controller set it; neither submitting nor applying again takes it away."""
    assert submit("--no-follow", "--queue", "research")[0] == 0
    suspended = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "small"}, "spec": {"suspend": True}}
    operator.client.patch(RayJob, "small", suspended, patch_type=PatchType.APPLY, field_manager="kueue")
    operator.report("Suspended")
    code, _, err = submit("--no-follow", "--queue", "research")
    assert code == 2 and "waiting in queue research" in err

    cluster = Cluster(operator.client, operator.namespace)
    job = render(overlay_template(None), config_file.load(config_path), Where(None, "made:here", None, "research"))
    cluster.apply(job)
    assert operator.client.get(RayJob, "small")["spec"]["suspend"] is True
    taken = {**job, "spec": {**job["spec"], "suspend": False}}
    with pytest.raises(UserError, match=r"\.spec\.suspend is set by another .*kueue.*; leave the field to its manager"):
        cluster.apply(taken)
    assert operator.client.get(RayJob, "small")["spec"]["suspend"] is True


def test_what_another_manager_holds_and_what_the_schema_does_not_know_is_said(
    submit: Submit, operator: Operator, config_path: Path
) -> None:
    assert submit("--no-follow")[0] == 0
    cluster = Cluster(operator.client, operator.namespace)
    job = render(overlay_template(None), config_file.load(config_path), HERE)
    held = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "small"}, "spec": {"backoffLimit": 9}}
    operator.client.patch(RayJob, "small", held, patch_type=PatchType.APPLY, field_manager="someone", force=True)
    with pytest.raises(UserError, match=r"\.spec\.backoffLimit is set by another .*someone"):
        cluster.apply(job)
    for spec, said in (
        ({"nonsense": 1}, r"\.spec\.nonsense: field not declared in schema.*older than the template"),
        ({"preRunningDeadlineSeconds": 0}, "the cluster refuses it: .*preRunningDeadlineSeconds"),
    ):
        other = {**job, "metadata": {**job["metadata"], "name": "other"}, "spec": {**job["spec"], **spec}}
        with pytest.raises(UserError, match=said):
            cluster.apply(other)


HERE = Where(None, "made:here")


def test_a_run_that_is_suspended_by_a_person_goes_on_when_it_is_submitted(submit: Submit, operator: Operator) -> None:
    assert submit("--no-follow")[0] == 0
    operator.client.patch(RayJob, "small", {"spec": {"suspend": True}}, patch_type=PatchType.MERGE)
    operator.report("Suspended")

    def collect() -> None:
        wait_for(lambda: "deletionTimestamp" in (operator.job() or {"metadata": {}})["metadata"])
        operator.collect()

    with meanwhile(collect):
        assert submit("--no-follow")[0] == 0
    found = operator.job()
    assert found is not None and not found["spec"].get("suspend")


def test_a_run_is_stopped_and_whoever_follows_it_hears_so(submit: Submit, operator: Operator) -> None:
    code, _, err = submit("--delete")
    assert code == 2 and "there is no RayJob small" in err

    def stop() -> None:
        operator.act(lambda: operator.report("Running", "RUNNING"))
        Cluster(operator.client, operator.namespace).delete("small")
        operator.collect()

    with meanwhile(stop):
        code, _, err = submit()
    assert code == 75 and "preempted: the run small was deleted on the cluster; submitting it again goes on" in err
    assert operator.job() is None

    assert submit("--no-follow")[0] == 0
    code, out, _ = submit("--delete")
    assert code == 0 and "small: asked to save and end" in out
    found = operator.job()
    assert found is not None and "deletionTimestamp" in found["metadata"]
    assert found["metadata"]["finalizers"] == ["foregroundDeletion"]  # gone when its pods are
    operator.collect()
    assert operator.job() is None


def test_what_others_have_made_is_neither_replaced_nor_deleted(
    submit: Submit, operator: Operator, config_path: Path
) -> None:
    job = render(overlay_template(None), config_file.load(config_path, ["name=Small"]), HERE)
    Cluster(operator.client, operator.namespace).apply(job)
    operator.report("Failed", "FAILED")
    before = operator.job()
    code, _, err = submit("--no-follow")
    assert code == 2 and "belongs to the run Small; give this run another name" in err
    code, _, err = submit("--delete")
    assert code == 2 and "was not made for the run small" in err
    assert operator.job() == before


def test_a_cluster_that_cannot_be_had_is_said_in_one_line(
    submit: Submit, server: ApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, _, err = submit("--context", "nowhere")
    assert code == 2 and "Context 'nowhere' not found" in err and "--context" in err
    nobody = tmp_path / "kubeconfig"
    tree = yaml.safe_load(server.kubeconfig.read_text())
    tree["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    nobody.write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("KUBECONFIG", str(nobody))
    code, _, err = submit("--no-follow")
    assert code == 1 and "failed: Unreachable: the cluster does not answer: " in err and len(err.splitlines()) == 1
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    code, _, err = submit("--no-follow")
    assert code == 2 and "no Kubernetes cluster to submit to" in err


@pytest.mark.parametrize("part", ["cluster", "namespace"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_queues_and_monitors_pass_the_rules_of_their_kinds(server: ApiServer, overlay: str, part: str) -> None:
    """Those that are expressions of CEL too, which no schema check sees."""
    kueue, version = "kueue.x-k8s.io", "v1beta2"
    create_namespaced_resource(kueue, version, "LocalQueue", "localqueues")
    create_global_resource(kueue, version, "ClusterQueue", "clusterqueues")
    create_global_resource(kueue, version, "ResourceFlavor", "resourceflavors")
    create_namespaced_resource("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors")
    served = {"LocalQueue", "ClusterQueue", "ResourceFlavor", "PodMonitor"}
    with Client(KubeConfig.from_file(server.kubeconfig), field_manager="administrator") as client:
        for manifest in kustomized(f"overlays/{overlay}/{part}"):
            if manifest["kind"] in served:
                client.apply(codecs.from_dict(manifest), dry_run=True)
