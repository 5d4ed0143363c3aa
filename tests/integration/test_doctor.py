"""`broadgauge doctor` as a user starts it: on this machine, and on the machines of a Ray cluster."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.cli.main import main
from launcher.doctor import cluster as doctor_cluster
from launcher.doctor.machine import Subject
from launcher.job import cluster
from machines import Machines, machines
from small_run import BROADGAUGE, broadgauge, write_config

PATIENCE_SECONDS = 60  # only a broken program waits this long
ROOT = Path(__file__).parents[2]
EVERYWHERE = {"devices", "driver", "shared memory", "snapshots", "open files", "processes", "disk", "storage"}
TOGETHER = {"clock", "versions", "layout", "network"}
Finding = dict[str, Any]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), launch={"device": "cpu"})


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_this_machine_in_json(config: Path, tmp_path: Path) -> None:
    done = broadgauge("doctor", config, "--run-dir", tmp_path / "runs" / "a", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["verdict"] in ("ok", "warn")
    found: dict[str, Finding] = {finding["check"]: finding for finding in told["findings"]}
    assert found.keys() == EVERYWHERE | TOGETHER
    assert found["disk"]["facts"]["write_bytes_per_second"] > 0
    assert found["network"]["facts"]["latency_seconds"] > 0
    assert "corpus.jsonl: 1 file(s), 217.2 kB" in found["storage"]["measured"]
    assert {found[check]["verdict"] for check in ("storage", "layout", "snapshots")} == {"ok"}
    assert all(bool(finding["fix"]) == (finding["verdict"] in ("warn", "fail")) for finding in found.values())
    assert not list(tmp_path.iterdir())


def test_what_a_run_would_fail_for_is_said_with_the_fix(config: Path, tmp_path: Path) -> None:
    """A model of 175B parameters, of text that is not there, on an interface that is not there."""
    model = ["model.num_layers=96", "model.hidden_size=12288", "model.num_heads=96"]
    changes = [*model, "data.sources=nowhere.jsonl", "launch.env={GLOO_SOCKET_IFNAME: nowhere0}"]
    done = broadgauge("doctor", config, "--run-dir", tmp_path / "a", "--set", *changes)
    assert (done.returncode, done.stderr) == (1, "")
    *lines, summary = done.stdout.splitlines()
    failed = {line[8:22].strip(): line for line in lines if line.startswith("fail ")}
    assert failed.keys() >= {"snapshots", "disk", "storage", "layout", "network"}
    assert all("; fix: " in line for line in failed.values())
    assert "a snapshot takes 2.1 TB on a machine, and 2 of them are kept" in failed["snapshots"]
    assert "data.sources: nowhere.jsonl does not exist; fix: name a file" in failed["storage"]
    assert summary.endswith("skipped") and f"{len(failed)} fail" in summary
    assert not list(tmp_path.iterdir())


def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, error in (
        ([str(tmp_path / "absent.yaml")], "error: cannot read the config"),
        (["--set", "seed=1"], "error: --set changes values of a config, and none is given; name one"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["doctor", *arguments])
        assert end.value.code == 2 and capsys.readouterr().err.startswith(error)


def test_a_cluster_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--ray", "127.0.0.1:1"])
    first, summary = capsys.readouterr().out.splitlines()
    assert end.value.code == 1 and summary == "1 fail"
    assert first.startswith("fail    cluster        --ray 127.0.0.1:1: no Ray cluster to connect to (")


def ranks_of(command: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(command.pid).children()
    return [each for each in children if "launcher.doctor.checks.network" in cmdline(each)]


def cmdline(process: psutil.Process) -> list[str]:
    """Nothing of one that has ended meanwhile."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def test_nothing_is_left_of_one_that_is_killed(tmp_path: Path) -> None:
    command = subprocess.Popen([BROADGAUGE, "doctor", "--run-dir", tmp_path / "a"], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: len(ranks_of(command)) == 2)
    ranks = ranks_of(command)
    (session,) = {each.environ()["BROADGAUGE_SESSION"] for each in ranks}
    command.kill()
    command.communicate()
    wait_until(lambda: not any(each.is_running() for each in ranks) and not Path(session).exists())
    assert not list(tmp_path.iterdir())


def test_every_check_is_documented() -> None:
    rows = [line.split("|")[1].strip() for line in (ROOT / "docs/doctor.md").read_text().splitlines() if "|" in line]
    assert EVERYWHERE | TOGETHER | {"cluster", "shared folder"} <= set(rows)


# ------------------------------------------------------------------------------------------------------------- cluster


def on_cluster(at: Machines, config: Path, *more: object) -> tuple[int, list[Finding]]:
    """Exit code and findings."""
    done = subprocess.run(
        [BROADGAUGE, "doctor", str(config), "--ray", at.address, "--json", *map(str, more)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_SECONDS,
        check=False,
        # or Ray puts the machine's address in the place of 127.0.0.1, where the cluster does not listen
        env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]


def processes_of(machine: str) -> list[psutil.Process]:
    """Of a machine by its name: the process that stands for it, and Ray's below."""
    (top,) = (each for each in psutil.Process().children() if machine in each.cmdline())
    return [top, *top.children(recursive=True)]


@pytest.mark.slow
@pytest.mark.timeout(5 * PATIENCE_SECONDS)
def test_machines_of_a_cluster(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "runs" / "a"
    with machines(2) as made:
        code, findings = on_cluster(made, config, "--run-dir", run_dir)
        assert code == 0, findings
        (nodes,) = {tuple(f["node"] for f in findings if f["check"] == check) for check in EVERYWHERE | {"clock"}}
        assert len(set(nodes)) == 2 and all(node.startswith("127.0.0.1/") for node in nodes)
        for clock in (f for f in findings if f["check"] == "clock"):
            assert clock["verdict"] == "ok" and abs(clock["facts"]["ahead_seconds"]) < 0.1
        whole = {f["check"]: f for f in findings if not f["node"]}
        assert whole.keys() == {"cluster", "shared folder", "versions", "layout", "network"}
        assert whole["network"]["measured"].startswith("2 ranks on as many machines (gloo): ")
        assert whole["network"]["facts"]["bus_bytes_per_second"] > 0
        assert whole["versions"]["verdict"] == "ok" and len(whole["versions"]["facts"]) == 3

        broken = [
            "data.sources=nowhere.jsonl",
            "launch.env={GLOO_SOCKET_IFNAME: nowhere0}",
            "launch.nodes=4",
            "parallel.data=2",
        ]
        code, findings = on_cluster(made, config, "--run-dir", run_dir, "--set", *broken)
        failed = [(f["check"], f["node"]) for f in findings if f["verdict"] == "fail"]
        assert code == 1
        assert failed == [*(("storage", node) for node in nodes), ("layout", ""), ("network", "")], findings
        assert "nowhere0" in findings[-1]["measured"]

        _expect_a_machine_that_hangs_to_be_named(tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


def _expect_a_machine_that_hangs_to_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray thinks that it lives: what is asked of it has no answer, and the other one is examined all the same."""
    monkeypatch.setattr(doctor_cluster, "_examine_seconds", lambda _: 10.0)
    hanging = processes_of("machine-1")
    for process in hanging:
        process.send_signal(signal.SIGSTOP)
    try:
        found = list(doctor_cluster._examine(Subject(None, folder), cluster.machines()))
    finally:
        for process in hanging:
            process.send_signal(signal.SIGCONT)
    (silent,) = [f for f in found if f.verdict == "fail"]
    assert (silent.check, silent.measured) == ("cluster", "no answer in 10 s") and silent.node
    assert {f.node for f in found if f.check == "disk"} - {silent.node} and found[-1].check == "network"
