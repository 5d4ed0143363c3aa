"""A real Prometheus on loopback, and what it knows."""

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kubernetes_tools import need_tool

_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str) -> Any:
    """What the condition says, once it is true.

    Raises:
        AssertionError: it does not become so.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {_PATIENCE_SECONDS:g} s: {what}"
        time.sleep(_POLL_SECONDS)
    return found


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **query: str) -> Any:
        """The answer of its API; None while it does not answer."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Its result now: of each series its labels (`metric`) and `value`."""
        found = self.get("/api/v1/query", query=expression)
        return list(found["result"]) if found else []

    def value(self, expression: str) -> float | None:
        """Of the only series."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if len(found) == 1 else None


@contextmanager
def prometheus(folder: Path, config: Mapping[str, Any]) -> Iterator[Prometheus]:
    """With a configuration; gone at the end."""
    need_tool("prometheus")
    port, path = free_port(), folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    command = [
        *("prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        f"--web.listen-address=127.0.0.1:{port}",
        "--scrape.discovery-reload-interval=100ms",  # what it has found it would scrape from five seconds later only
    ]
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until(lambda: process.poll() is not None or server.get("/api/v1/status/runtimeinfo"), "Prometheus answers")
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield server
    finally:
        process.kill()
        process.wait()
