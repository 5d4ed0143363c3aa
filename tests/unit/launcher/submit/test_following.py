"""What whoever follows a run is shown: states, the driver's log, and the end, from a server that follows a script."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from lightkube import Client, KubeConfig
from lightkube.config.models import Cluster as ClusterAddress
from lightkube.config.models import User

from launcher.submit.kubernetes import names
from launcher.submit.kubernetes.cluster import Cluster, Unreachable
from launcher.submit.kubernetes.following import RunFailed, follow
from launcher.submit.kubernetes.pace import Pace
from launcher.submit.kubernetes.state import JobState
from trainer.config import UserError
from trainer.stop import Preempted

JOB = "/apis/ray.io/v1/namespaces/runs/rayjobs/big"
PODS = "/api/v1/namespaces/runs/pods"

Answer = tuple[int, Any]


def rayjob(deployment: str, job: str = "", uid: str = "1", **more: Any) -> Answer:
    metadata = {
        "name": "big",
        "uid": uid,
        "labels": {names.MANAGED_BY: names.US},
        "annotations": {names.RUN_ANNOTATION: "big"},
    }
    status = {"jobDeploymentStatus": deployment, "jobStatus": job, **more}
    return 200, {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "status": status}


def pod(name: str, second: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:{second:02}Z"}}


def refusal(code: int, message: str, **details: Any) -> Answer:
    return code, {"kind": "Status", "apiVersion": "v1", "code": code, "message": message, "details": details}


GONE = refusal(404, 'rayjobs.ray.io "big" not found', name="big")


class Script:
    """Answers by path, each list in order; the last one stays."""

    def __init__(self, **answers: Any) -> None:
        self.job: list[Answer] = answers["job"]
        self.pods: list[Answer] = answers.get("pods", [refusal(403, "pods is forbidden")])
        self.logs: dict[str, list[str]] = answers.get("logs", {})
        self.asked: list[str] = []

    def answer(self, path: str) -> Answer:
        self.asked.append(path)
        plain = path.partition("?")[0]
        if plain.endswith("/log"):
            return 200, self.logs[plain.split("/")[-2]]
        script = self.job if plain == JOB else self.pods if plain == PODS else [(404, "404 page not found\n")]
        return script.pop(0) if len(script) > 1 else script[0]


@contextmanager
def served(script: Script) -> Iterator[Cluster]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = script.answer(self.path)
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if isinstance(body, list | str) else "application/json")
            self.end_headers()
            text = "".join(f"{line}\n" for line in body) if isinstance(body, list) else body
            self.wfile.write((text if isinstance(text, str) else json.dumps(text)).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = ClusterAddress(server=f"http://127.0.0.1:{server.server_port}")
        try:
            with Client(KubeConfig.from_one(cluster=address, user=User(token="made"), namespace="runs")) as client:
                yield Cluster(client, "runs")
        finally:
            server.shutdown()
            thread.join()


class Clock:
    """Time passes when somebody sleeps."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.now, self._wake = 0.0, wake

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._wake()


def followed(script: Script, clock: Clock | None = None) -> list[str]:
    clock, said = clock or Clock(), []
    begun = JobState.of(rayjob("")[1])
    with served(script) as cluster:
        follow(cluster, begun, said.append, Pace(2.0, clock.sleep, lambda: clock.now))
    return said


def test_every_change_is_said_once() -> None:
    script = Script(
        job=[
            *(rayjob("Initializing"), rayjob("Initializing"), rayjob("Running", "RUNNING")),
            *(rayjob("Retrying", failed=1), rayjob("Running", "RUNNING", failed=1)),
            rayjob("Complete", "SUCCEEDED", failed=1),
        ]
    )
    no_log, *states = followed(script)
    assert no_log.startswith(
        "no log to show, only the state: pods: pods is forbidden; bind the role broadgauge-submitter"
    )
    assert states == [
        "big: Initializing",
        "big: Running (RUNNING)",
        "big: Retrying, after 1 lost",
        "big: Running (RUNNING), after 1 lost",
        "big: Complete (SUCCEEDED)",
    ]
    assert sum(path.startswith(PODS) for path in script.asked) == 1  # what is forbidden is not asked for again


def test_the_log_of_every_life_of_the_driver_is_shown() -> None:
    first, second = pod("big-aaa", 1), pod("big-bbb", 2)
    clock = Clock()
    script = Script(
        job=[rayjob("Running", "RUNNING")],
        pods=[(200, {"items": []}), (200, {"items": [first]}), (200, {"items": [second, first]})],
        logs={"big-aaa": ["step 1", "step 2"], "big-bbb": ["step 2 again", "the end"]},
    )
    said: list[str] = []

    def end_after_the_second_log() -> None:
        if "the end" in said:
            script.job = [rayjob("Complete", "SUCCEEDED")]

    clock = Clock(end_after_the_second_log)
    with served(script) as cluster:
        follow(cluster, JobState.of(rayjob("")[1]), said.append, Pace(2.0, clock.sleep, lambda: clock.now))
    assert [line for line in said if not line.startswith("big: ")] == ["step 1", "step 2", "step 2 again", "the end"]
    assert any("labelSelector=job-name%3Dbig" in path for path in script.asked)
    assert all("follow=true" in path.lower() for path in script.asked if "/log" in path)


ENDS: dict[str, tuple[list[Answer], type[Exception], str]] = {
    "failed": ([rayjob("Failed", "FAILED", reason="AppFailed")], RunFailed, "big is Failed .*: AppFailed; submitting"),
    "refused by the operator": (
        [rayjob("ValidationFailed", message="no name")],
        RunFailed,
        "ValidationFailed: no name",
    ),
    "stopped": ([rayjob("Complete", "STOPPED")], Preempted, "the run big was stopped"),
    "deleted": ([rayjob("Running", "RUNNING"), GONE], Preempted, "the run big was deleted"),
    "replaced": ([rayjob("Running", "RUNNING"), rayjob("", uid="2")], Preempted, "the run big was deleted"),
    "no KubeRay any more": ([(404, "404 page not found\n")], UserError, "no RayJobs; install the KubeRay operator"),
    "silent": ([refusal(503, "etcd is away")], Unreachable, "etcd is away; the run goes on there"),
}


@pytest.mark.parametrize(("answers", "error", "said"), ENDS.values(), ids=ENDS)
def test_how_a_run_ends_there_is_how_the_command_ends(answers: list[Answer], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        followed(Script(job=answers))


def test_a_cluster_may_be_silent_for_a_while() -> None:
    clock = Clock()
    silence = [refusal(503, "etcd is away")] * 200
    said = followed(Script(job=[rayjob("Running", "RUNNING"), *silence, rayjob("Complete", "SUCCEEDED")]), clock)
    assert said[-1] == "big: Complete (SUCCEEDED)" and clock.now >= 400
