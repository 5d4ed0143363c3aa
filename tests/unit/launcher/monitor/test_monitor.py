"""What a command serves of its run, where it says so, and that it takes all of it away at its end."""

import json
import stat
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from launcher.monitor.monitor import Monitor
from trainer.config_file import from_tree
from trainer.events import EventLog
from trainer.run_dir import RunDir


def monitored(folder: Path, **monitoring: Any) -> tuple[Monitor, RunDir]:
    config, run_dir = from_tree({"name": "lion", "monitoring": monitoring}), RunDir(folder / "run")
    run_dir.create(config)
    return Monitor(config, run_dir, lambda *_, **__: None), run_dir


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return bytes(answer.read())


def test_a_run_is_told_of_as_it_goes_on(tmp_path: Path) -> None:
    monitor, run_dir = monitored(tmp_path)
    with closing(monitor):
        assert monitor.url is not None and b"broadgauge_steps_total 0.0" in get(f"{monitor.url}metrics")
        log = EventLog(run_dir.events_path)
        for step in (1, 2):
            facts = {"tokens": step, "num_samples": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "phases": {}}
            log.write("step", step=step, seconds=1.0, **facts)
            assert f"broadgauge_steps_total {step}.0".encode() in get(f"{monitor.url}metrics")
        (run_dir.logs / "rank-0.log").write_text("first\nlast\n")
        view = json.loads(get(f"{monitor.url}api/run"))
        assert view["step"] == 2 and {"log": "rank-0", "line": "last"} in view["log"]
        assert get(monitor.url).startswith(b"<!doctype html>")


def test_prometheus_is_told_where_to_look_as_long_as_there_is_something(tmp_path: Path) -> None:
    monitor, run_dir = monitored(tmp_path)
    with closing(monitor):
        own = monitor.url.removeprefix("http://").rstrip("/")  # type: ignore[union-attr]
        assert json.loads((tmp_path / "run.prometheus.json").read_text()) == [
            {"targets": [own], "labels": {"run": "lion"}}
        ]
        monitor.found(["10.0.0.1:9401", "10.0.0.2:9401"])
        (group,) = json.loads(run_dir.targets_path.read_text())
        assert group["targets"] == [own, "10.0.0.1:9401", "10.0.0.2:9401"]
        inode = run_dir.targets_path.stat().st_ino
        monitor.found(["10.0.0.1:9401", "10.0.0.2:9401"])
        assert run_dir.targets_path.stat().st_ino == inode  # nothing has changed
        assert run_dir.page_url_path.read_text() == monitor.url
    assert not run_dir.targets_path.exists() and not run_dir.page_url_path.exists()


def test_what_nobody_may_reach_is_not_there(tmp_path: Path) -> None:
    monitor, run_dir = monitored(tmp_path, listen="nowhere")
    with closing(monitor):
        monitor.found(["10.0.0.1:9401"])
        assert (monitor.url, monitor.problem) == (None, None)
        assert not run_dir.targets_path.exists() and not run_dir.page_url_path.exists()


def test_on_the_network_the_page_asks_for_a_token_and_metrics_do_not(tmp_path: Path) -> None:
    monitor, run_dir = monitored(tmp_path, listen="network")
    with closing(monitor):
        assert monitor.url is not None
        address, _, token = monitor.url.partition("#")
        assert len(token) >= 32 and b"broadgauge_steps_total" in get(f"{address}metrics")
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": token}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(f"{address}api/run", **headers)
        assert json.loads(get(f"{address}api/run", Authorization=f"Bearer {token}"))["name"] == "lion"
        for path in (run_dir.page_url_path, run_dir.page_token_path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        first = token
    again, _ = monitored(tmp_path, listen="network")
    with closing(again):
        assert again.url is not None and again.url.endswith(f"#{first}")  # a bookmark stays good


def test_a_command_that_cannot_serve_goes_on_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.monitor.monitor.HttpServer", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    monitor, _ = monitored(tmp_path)
    with closing(monitor):
        assert monitor.url is None and monitor.problem == "there is no page of this run: no room"
        monitor.found([])
