"""From an endpoint to whom it may concern: real Prometheus and Alertmanager, on loopback.

The rules are the shipped ones, but for their time: `for` and `interval` are a second, so that what takes minutes takes
seconds.
"""

import json
import queue
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubernetes_tools import need_tool
from monitoring_tools import RULES
from prometheus_server import free_port

DEADLINE_SECONDS = 30.0
METRICS = b"""\
# TYPE broadgauge_run_state gauge
broadgauge_run_state{state="training"} 1
# TYPE broadgauge_run_disk_free_bytes gauge
broadgauge_run_disk_free_bytes 2147483648
# TYPE broadgauge_checkpoints_saved_total counter
broadgauge_checkpoints_saved_total 0
# TYPE broadgauge_checkpoint_saved_bytes_total counter
broadgauge_checkpoint_saved_bytes_total 0
"""


class Peer(BaseHTTPRequestHandler):
    """The endpoint of a run, and the webhook that is told of alerts."""

    told: "queue.Queue[dict[str, Any]]"

    def do_GET(self) -> None:
        self._answer(METRICS)

    def do_POST(self) -> None:
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def peer() -> Iterator[tuple[int, "queue.Queue[dict[str, Any]]"]]:
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Told", (Peer,), {"told": told}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def process(*command: str, ready: str) -> Iterator[None]:
    """Until it answers at `ready`; killed in the end."""
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    assert running.stdout is not None
    reader = threading.Thread(target=said.extend, args=(running.stdout,))
    reader.start()
    try:
        _wait_for(ready, running, said)
        yield
    finally:
        running.kill()
        running.wait()
        reader.join()
        running.stdout.close()


def _wait_for(url: str, running: "subprocess.Popen[str]", said: list[str]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1.0):
                return
        except OSError as error:
            if running.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{running.args} does not answer: {''.join(said)}") from error
            time.sleep(0.05)


def write_yaml(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def hurried_rules(folder: Path) -> Path:
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    return write_yaml(folder / "rules.yaml", rules)


def alertmanager_config(folder: Path, webhook_port: int) -> Path:
    """Pages go to the webhook, each run's together, as k8s/monitoring/README.md routes them; warnings go nowhere."""
    return write_yaml(
        folder / "alertmanager.yaml",
        {
            "route": {
                "receiver": "chat",
                "group_by": ["run"],
                "group_wait": "0s",
                "routes": [{"matchers": ['severity = "page"'], "receiver": "pager"}],
            },
            "receivers": [
                {"name": "chat"},
                {"name": "pager", "webhook_configs": [{"url": f"http://127.0.0.1:{webhook_port}/"}]},
            ],
        },
    )


def prometheus_config(folder: Path, target_port: int, alertmanager_port: int) -> Path:
    """The run's labels come from files, as on any machine."""
    targets = [{"targets": [f"127.0.0.1:{target_port}"], "labels": {"run": "full"}}]
    found = write_yaml(folder / "targets.yaml", targets)
    return write_yaml(
        folder / "prometheus.yaml",
        {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(hurried_rules(folder))],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager_port}"]}]}]},
            "scrape_configs": [{"job_name": "broadgauge", "file_sd_configs": [{"files": [str(found)]}]}],
        },
    )


@pytest.fixture
def webhook(tmp_path: Path) -> Iterator["queue.Queue[dict[str, Any]]"]:
    need_tool("prometheus", "prometheus-alertmanager")
    prometheus_port, alertmanager_port = free_port(), free_port()
    with ExitStack() as stack:
        port, told = stack.enter_context(peer())
        stack.enter_context(
            process(
                "prometheus-alertmanager",
                f"--config.file={alertmanager_config(tmp_path, port)}",
                f"--storage.path={tmp_path / 'alertmanager'}",
                f"--web.listen-address=127.0.0.1:{alertmanager_port}",
                "--cluster.listen-address=",
                ready=f"http://127.0.0.1:{alertmanager_port}/-/ready",
            )
        )
        stack.enter_context(
            process(
                "prometheus",
                f"--config.file={prometheus_config(tmp_path, port, alertmanager_port)}",
                f"--storage.tsdb.path={tmp_path / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{prometheus_port}",
                "--scrape.discovery-reload-interval=100ms",
                ready=f"http://127.0.0.1:{prometheus_port}/-/ready",
            )
        )
        yield told


def test_a_page_reaches_the_pager_with_what_it_is_to_say(webhook: "queue.Queue[dict[str, Any]]") -> None:
    message = webhook.get(timeout=DEADLINE_SECONDS)
    assert message["receiver"] == "pager" and message["status"] == "firing"
    assert message["groupLabels"] == {"run": "full"}
    (alert,) = message["alerts"]
    assert alert["labels"] == {"alertname": "BroadgaugeDiskAlmostFull", "run": "full", "severity": "page"}
    assert alert["annotations"] == {
        "summary": "The disk of full has no room for another checkpoint",
        "description": "2GiB are free where its folder lies: less than 5 GiB, or than one and a half checkpoints.",
        "runbook": "docs/runbooks/BroadgaugeDiskAlmostFull.md",
    }
