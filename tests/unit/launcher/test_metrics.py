"""What endpoints tell: everything that is declared, nothing else, and no more series than a large job may have."""

import math
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from launcher.exposition import expose
from launcher.history.history import RunHistory
from launcher.history.values import RUN_STATES, Facts, run_values, state_of
from launcher.node import exporter
from trainer import metrics
from trainer.config_file import from_tree
from trainer.events import Event
from trainer.heartbeat import PHASES, STEP_PHASES, Beat, Memory, StepTime
from trainer.metrics import Metric

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
CONFIG = from_tree(
    {"name": "lion", "monitoring": {"device_peak_flops": 1e15}, "train": {"total_tokens": 256 * 2048 * 50}}
)
FACTS = Facts.of(CONFIG)
NOW = 2000.0


def events(num_sources: int = 2) -> list[Event]:
    """Of a run that has seen everything."""
    sources = {
        f"source-{number}": {"documents": 7, "tokens": 70, "dropped": {"too_short": 3, "duplicate": 1}}
        for number in range(num_sources)
    }
    scores = {
        "bits_per_byte": 2.5,
        "datasets": {name: {"loss": 9.5, "tokens": 8, "bits_per_byte": 2.75} for name in sources},
    }
    said: list[tuple[float, str, dict[str, Any]]] = [
        (1000, "stage_started", {"stage": "train"}),
        (1000, "blend", {"datasets": sources}),
        (1001, "life_started", {"number": 1, "nodes": 1, "data": 1, "why": ""}),
        (1005, "training_started", {"step": 0, "ranks": 4, "device": "NVIDIA H100 80GB HBM3"}),
        (1005, "planned", {"step_seconds": 1.5, "tokens_per_second": 1e5, "mfu": 0.4, "memory_bytes": 6e10}),
        (1006, "evaluated", {"step": 0, "loss": 9.0, "uniform_loss": 10.0, "unigram_loss": 7.0, **scores}),
        *((1006 + 2 * step, "step", step_fields(step)) for step in range(1, 21)),
        (1047, "checkpoint_snapshot", {"step": 20, "durable": True, "seconds": 0.5}),
        (1048, "checkpoint_saved", {"step": 20, "bytes": 1234, "seconds": 1.5}),
        (1049, "checkpoint_failed", {"step": 20, "reason": "x"}),
        (1049, "straggler", {"rank": 2, "phase": "loading data", "ratio": 2.0, "node": 0}),
        (1050, "ranks", {"step": 20, "seconds": [1, 2], "group": 1, "min": 1.0, "mean": 1.5, "max": 2.0, "slowest": 1}),
        (1051, "step_skipped", {"step": 21, "num_samples": 256, "reason": "quarantined"}),
        (1052, "life_failed", {"what": "rank", "error": "x", "machine": "", "step": 21}),
        (1053, "life_started", {"number": 2, "nodes": 1, "data": 1, "why": ""}),
        (1054, "training_started", {"step": 20, "ranks": 4, "device": "NVIDIA H100 80GB HBM3"}),
        (1056, "step", step_fields(21)),
    ]
    return [{"time": float(when), "kind": kind, **fields} for when, kind, fields in said]


def step_fields(step: int) -> dict[str, Any]:
    phases = {"loading data": 0.25, "computing": 1.0, "reducing gradients": 0.25, "updating": 0.25, "agreeing": 0.25}
    facts = {"tokens": 2048 * 256 * step, "num_samples": 256, "loss": 10.0 - step / 10, "grad_norm": 1.5, "lr": 3e-4}
    return {"step": step, "seconds": 2.0, "phases": phases, **facts}


def beat(rank: int = 0, step: int = 7) -> Beat:
    seconds = dict.fromkeys(STEP_PHASES, 0.25)
    return Beat(
        *(100 + rank, 5, 7, step, step, "computing", 0.0, 0.0),
        *(dict.fromkeys(PHASES, 1.0), dict.fromkeys(PHASES, 0.0)),
        last_step=StepTime(seconds, {**dict.fromkeys(STEP_PHASES, 0.0), "agreeing": rank / 100}),
        memory=Memory(100 + rank, 200 + rank, 1000),
    )


def samples(values: Mapping[Metric, Mapping[tuple[str, ...], float]]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Of the page of an endpoint, as another's parser reads it: series and values of labels, by name -> value."""
    page, content_type = expose(values, OPEN_METRICS)
    assert content_type.startswith("application/openmetrics-text")
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found[sample.name, tuple(sample.labels.values())] = sample.value
    return found


def test_names_follow_the_rules() -> None:
    every = (*metrics.NODE, *metrics.RUN)
    assert max(Counter(metric.name for metric in every).values()) == 1
    for metric in every:
        assert metric.name.startswith("broadgauge_") and metric.name == metric.name.lower()
        assert not metric.name.endswith(("_total", "_info", "_count"))
        assert metric.help.endswith(".") and len(metric.help) < 120
        assert not {"step", "rank", "hash", "id", "sha", "commit"} & set(metric.labels)
        assert metric.unit or not metric.name.endswith(("_ms", "_kb", "_mb", "_percent", "_minutes"))


def test_a_run_tells_every_metric_that_is_declared() -> None:
    values = run_values(RunHistory.of(events()), FACTS, NOW, 5e9)
    assert values.keys() == set(metrics.RUN)
    for metric, series in values.items():
        assert series, metric.name
        for labels, value in series.items():
            assert len(labels) == len(metric.labels) and not math.isnan(value), metric.name


def test_a_machine_tells_every_metric_that_is_declared() -> None:
    values = exporter.node_values({rank: beat(rank) for rank in range(8)})
    assert values.keys() == set(metrics.NODE) and all(values.values())


def test_what_a_run_tells_is_what_happened() -> None:
    found = samples(run_values(RunHistory.of(events()), FACTS, NOW, 5e9))
    expected = {
        ("broadgauge_step", ()): 21,
        ("broadgauge_planned_steps", ()): 50,
        ("broadgauge_consumed_tokens", ()): 21 * 256 * 2048,
        ("broadgauge_loss", ()): 7.9,
        ("broadgauge_steps_total", ()): 21,
        ("broadgauge_samples_total", ()): 21 * 256,
        ("broadgauge_tokens_total", ()): 21 * 256 * 2048,
        ("broadgauge_skipped_steps_total", ("quarantined",)): 1,
        ("broadgauge_quarantined_samples_total", ()): 256,
        ("broadgauge_step_time_seconds_total", ()): 42,
        ("broadgauge_phase_time_seconds_total", ("computing",)): 21,
        ("broadgauge_tokens_per_second", ()): 256 * 2048 / 2,
        ("broadgauge_device_tokens_per_second", ()): 256 * 2048 / 8,
        ("broadgauge_mfu_ratio", ()): 256 * 2048 / 2 * FACTS.flops_per_token / 4e15,
        ("broadgauge_rank_step_seconds", ("max",)): 2.0,
        ("broadgauge_slowest_rank", ()): 1,
        ("broadgauge_planned_step_seconds", ()): 1.5,
        ("broadgauge_planned_memory_bytes", ()): 6e10,
        ("broadgauge_stragglers_total", ("loading_data",)): 1,
        ("broadgauge_checkpoints_saved_total", ()): 1,
        ("broadgauge_checkpoint_saved_bytes_total", ()): 1234,
        ("broadgauge_checkpoint_stall_seconds_total", ()): 0.5,
        ("broadgauge_checkpoint_failures_total", ("save",)): 1,
        ("broadgauge_checkpoint_age_seconds", ()): NOW - 1048,
        ("broadgauge_evaluation_score", ("loss", "heldout")): 9.0,
        ("broadgauge_evaluation_score", ("bits_per_byte", "heldout")): 2.5,
        ("broadgauge_heldout_score", ("loss", "source-1")): 9.5,
        ("broadgauge_heldout_score", ("bits_per_byte", "source-1")): 2.75,
        ("broadgauge_restarts_total", ("rank",)): 1,
        ("broadgauge_restarts_total", ("machine",)): 0,
        ("broadgauge_data_tokens", ("source-1",)): 70,
        ("broadgauge_data_dropped_documents", ("too_short", "source-1")): 3,
        ("broadgauge_run_disk_free_bytes", ()): 5e9,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    shares = [value for (name, _), value in found.items() if name == "broadgauge_time_seconds"]
    assert sum(shares) == pytest.approx(NOW - 1000)
    assert found["broadgauge_goodput_ratio", ()] == pytest.approx(
        found["broadgauge_time_seconds", ("productive",)] / sum(shares)
    )
    assert [value for (name, _), value in found.items() if name == "broadgauge_run_state"].count(1) == 1


def test_a_device_whose_peak_is_known_needs_no_setting() -> None:
    facts = Facts.of(from_tree({"name": "lion"}))
    found = samples(run_values(RunHistory.of(events()), facts, NOW, 0))
    assert found["broadgauge_mfu_ratio", ()] == pytest.approx(256 * 2048 / 2 * facts.flops_per_token / (4 * 989.5e12))


def test_a_run_that_has_not_begun_tells_what_there_is() -> None:
    values = run_values(RunHistory(), FACTS, NOW, 5e9)
    assert values.keys() == set(metrics.RUN)
    found = samples(values)
    assert found["broadgauge_step", ()] == 0 and math.isnan(found["broadgauge_loss", ()])
    assert found["broadgauge_run_state", ("starting",)] == 1


def test_counters_go_on_where_a_new_command_takes_over() -> None:
    """The record is all that they are made of; nothing that a command counted is lost with it."""
    said = events()
    before = samples(run_values(RunHistory.of(said), FACTS, NOW, 0))
    said += [
        {"time": 3000.0, "kind": "stage_started", "stage": "train"},
        {"time": 3001.0, "kind": "life_started", "number": 1, "nodes": 1, "data": 1, "why": ""},
        {"time": 3002.0, "kind": "training_started", "step": 0, "ranks": 4, "device": "CPU"},
        {"time": 3004.0, "kind": "step", **step_fields(1)},
    ]
    after = samples(run_values(RunHistory.of(said), FACTS, 3004.0, 0))
    counters = [key for key in before if key[0].endswith("_total")]
    assert len(counters) > 20
    for key in counters:
        assert after[key] >= before[key], key
    assert after["broadgauge_void_steps_total", ()] == 22 - 1


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ([], "starting"),
        ([("stage_started", {"stage": "prepare"})], "preparing"),
        ([("stage_started", {"stage": "train"})], "starting"),
        ([("stage_started", {"stage": "train"}), ("training_started", {"step": 0})], "training"),
        (
            [
                ("stage_started", {"stage": "train"}),
                ("training_started", {"step": 0}),
                ("life_failed", {"what": "rank", "error": ""}),
            ],
            "recovering",
        ),
        ([("stage_started", {"stage": "export"})], "exporting"),
        ([("stage_started", {"stage": "generate"})], "generating"),
        ([("stage_started", {"stage": "export"}), ("run_finished", {"seconds": 1})], "finished"),
        ([("stage_started", {"stage": "train"}), ("preempted", {"reason": ""})], "preempted"),
        ([("stage_started", {"stage": "train"}), ("failed", {"error": ""})], "failed"),
    ],
)
def test_the_state_is_what_the_run_does(last: list[tuple[str, dict[str, Any]]], state: str) -> None:
    history = RunHistory.of({"time": 1.0 + n, "kind": kind, **fields} for n, (kind, fields) in enumerate(last))
    assert state_of(history) == state and state in RUN_STATES


def test_a_job_of_10_000_ranks_has_20_000_series_at_most() -> None:
    """With a run that draws from 20 sources, from each of which it dropped for 10 reasons."""
    dropped = {f"reason-{number}": 1 for number in range(10)}
    said = events(num_sources=20)
    for source in said[1]["datasets"].values():
        source["dropped"] = dropped
    num_run = len(samples(run_values(RunHistory.of(said), FACTS, NOW, 0)))
    num_node = len(samples(exporter.node_values({rank: beat(rank) for rank in range(8)})))
    assert num_node <= 15
    total = num_run + sum(
        len(samples(exporter.node_values({rank: beat(rank) for rank in range(8 * node, 8 * node + 8)})))
        for node in range(1250)
    )
    assert total == num_run + 1250 * num_node <= 20_000


def test_a_machine_is_told_of_as_its_ranks_are() -> None:
    found = samples(exporter.node_values({8 + rank: beat(rank) for rank in range(3)}))
    own = [5 * 0.25 - rank / 100 for rank in range(3)]
    expected = {
        ("broadgauge_node_ranks", ()): 3,
        ("broadgauge_node_step_seconds", ("min",)): min(own),
        ("broadgauge_node_step_seconds", ("mean",)): sum(own) / 3,
        ("broadgauge_node_step_seconds", ("max",)): max(own),
        ("broadgauge_node_slowest_rank", ()): 8,
        ("broadgauge_node_phase_seconds", ("reducing_gradients",)): 0.25,
        ("broadgauge_node_device_memory_allocated_bytes", ("mean",)): 101,
        ("broadgauge_node_device_memory_reserved_bytes", ()): 202,
        ("broadgauge_node_resident_memory_bytes", ()): 3000,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_of_steps_nothing_is_told_before_all_ranks_have_done_one() -> None:
    for beats in ({}, {0: beat(0), 1: beat(1, step=0)}):
        values = exporter.node_values(beats)
        assert metrics.NODE_STEP not in values and values[metrics.NODE_RANKS] == {(): len(beats)}
        samples(values)


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = exporter.serve("127.0.0.1", 0, lambda: {rank: beat(rank) for rank in range(8)})
    yield f"http://{server.host}:{server.port}"
    server.close()


def test_a_scrape_of_a_machine_takes_under_20_ms(endpoint: str) -> None:
    took = []
    for _ in range(30):
        began = time.perf_counter()
        request = urllib.request.Request(f"{endpoint}/metrics", headers={"Accept": OPEN_METRICS})
        with urllib.request.urlopen(request, timeout=10) as answer:
            page = answer.read()
        took.append(time.perf_counter() - began)
    assert page.endswith(b"# EOF\n") and b"# UNIT broadgauge_node_step_seconds seconds" in page
    assert sorted(took)[len(took) // 2] < 0.020
