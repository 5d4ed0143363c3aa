"""A real Prometheus watches a live run of four ranks, which it finds by the file that the command writes."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deeds import find
from drilled_run import PATIENT, DrilledRun
from prometheus_server import Prometheus, prometheus, until
from small_run import BROADGAUGE, write_config
from trainer import config_file, metrics
from trainer.run_dir import RunDir

NUM_STEPS = 5000  # it is stopped long before


@pytest.fixture
def run(tmp_path: Path) -> DrilledRun:
    path = write_config(
        tmp_path,
        train={"total_tokens": NUM_STEPS * 16 * 32},
        parallel={"tensor": 2, "pipeline": 2},
        launch={"threads_per_rank": 1},
        checkpoint={"every_steps": 10},
        supervise=PATIENT,
        monitoring={"ranks_every_seconds": 0.5, "device_peak_flops": 1e11},
    )
    corpus = tmp_path / "corpus.jsonl"
    first, *_ = corpus.read_bytes().splitlines(keepends=True)
    corpus.write_bytes(corpus.read_bytes() + first)  # to be dropped
    return DrilledRun(config_file.load(path), path, RunDir(tmp_path / "runs" / "small"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Prometheus]:
    files = [str(tmp_path / "runs" / "*.prometheus.json")]
    discovery = [{"files": files, "refresh_interval": "1s"}]
    (folder := tmp_path / "prometheus").mkdir()
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "broadgauge", "file_sd_configs": discovery}],
    }
    with prometheus(folder, config) as server:
        yield server


@pytest.fixture
def command(run: DrilledRun) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [BROADGAUGE, "run", str(run.config_file), "--run-dir", str(run.run_dir.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.terminate()
    process.communicate(timeout=60)


def test_prometheus_finds_every_metric_of_a_live_run(
    run: DrilledRun, server: Prometheus, command: "subprocess.Popen[str]"
) -> None:
    both = until(lambda: len(found := server.query("up == 1")) == 2 and found, "both endpoints are up")
    assert {each["metric"]["run"] for each in both} == {"small"}

    def unseen() -> list[str]:
        return [
            metric.name
            for metric in (*metrics.NODE, *metrics.RUN)
            if not server.query(f'{metric.series}{{run="small"}}')
        ]

    until(lambda: server.value("broadgauge_checkpoints_saved_total") and not unseen(), "every metric has a value")
    known = {each["metric"]: each for each in server.get("/api/v1/targets/metadata")}
    for metric in (*metrics.NODE, *metrics.RUN):
        # metadata is known by the name of a family, or of its series
        facts = known.get(metric.name) or known[metric.series]
        assert (facts["type"], facts["unit"], facts["help"]) == (metric.kind, metric.unit, metric.help)
    steps_before = until(lambda: (steps := server.value("broadgauge_steps_total") or 0) > 12 and steps, "steps")

    # ranks die, and neither endpoint with them
    pid = find(run, "rank", 2)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.value('broadgauge_restarts_total{reason="rank"}') == 1, "the restart is counted")
    until(lambda: (server.value("broadgauge_steps_total") or 0) > steps_before + 10, "steps go on")
    assert server.value("min(min_over_time(up[5m]))") == 1
    assert server.value("resets(broadgauge_steps_total[5m])") == 0
    recorded = run.events("step", "training_started")
    assert server.value("broadgauge_steps_total") <= sum(event["kind"] == "step" for event in recorded)  # type: ignore[operator]
    shares = server.query("broadgauge_time_seconds")
    assert len(shares) == 7 and server.value('broadgauge_time_seconds{state="recovery"}')
    assert 0 < (server.value("broadgauge_goodput_ratio") or 0) < 1


@pytest.mark.slow
def test_a_command_takes_its_endpoints_with_it_and_the_next_one_goes_on_counting(
    run: DrilledRun, server: Prometheus, command: "subprocess.Popen[str]"
) -> None:
    until(lambda: (server.value("broadgauge_steps_total") or 0) > 5, "steps")
    addresses = json.loads(run.run_dir.targets_path.read_text())
    assert [len(each["targets"]) for each in addresses] == [2]
    command.terminate()
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 75, output
    assert not run.run_dir.targets_path.exists() and not run.run_dir.page_url_path.exists()
    until(lambda: server.get("/api/v1/targets")["activeTargets"] == [], "the endpoints are forgotten")
    num_steps = sum(event["kind"] == "step" for event in run.events())
    again = subprocess.Popen([BROADGAUGE, "resume", str(run.run_dir.path)], stdout=subprocess.DEVNULL, text=True)
    try:
        until(lambda: (server.value("broadgauge_steps_total") or 0) > num_steps, "the next command goes on counting")
        assert server.value('broadgauge_restarts_total{reason="command"}') == 1
    finally:
        again.terminate()
        again.wait(60)
