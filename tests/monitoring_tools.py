"""What tests of rules, dashboards and runbooks share: the files, promtool, and which series an expression names."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from kubernetes_tools import ROOT, need_tool
from launcher.history.history import RunHistory
from launcher.history.values import Facts, run_values
from trainer import config_file
from trainer.heartbeat import STEP_PHASES
from trainer.metrics import NODE, RUN, STATISTICS

MONITORING = ROOT / "k8s" / "monitoring"
RULES = MONITORING / "rules" / "broadgauge.rules.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks"

TARGET_LABELS = {"run", "instance", "job"}
"""Which discovery gives every series."""
_OTHERS = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
"""Series of Prometheus itself -> their labels beyond those."""
_KEYWORDS = {"and", "or", "unless", "offset", "bool"}


@cache
def rules() -> tuple[dict[str, Any], ...]:
    return tuple(rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"])


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded() -> set[str]:
    """Names of recording rules, and the one that is left to users."""
    own = "run:broadgauge_checkpoint_timestamp_seconds:own_limit"
    return {rule["record"] for rule in rules() if "record" in rule} | {own}


def promtool(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    need_tool("promtool")
    return subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def generator(name: str) -> ModuleType:
    """Of what is made from the code: `k8s/monitoring/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, MONITORING / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(expression: str) -> set[str]:
    """Series that an expression names."""
    text = re.sub(r'"[^"]*"|\[[^]]*\]', " ", expression)
    text = re.sub(r"\{[^}]*\}", " ", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    text = re.sub(r"\b[\d.]+(e\d+|[smhdwy]|ms)?\b", " ", text)
    return set(re.findall(r"(?<![\w:])[a-zA-Z_:][\w:]*\b(?!\s*\(|:)", text)) - _KEYWORDS


def selectors(expression: str) -> Iterator[tuple[str, str, list[str]]]:
    """(series, label, values) of every matcher of a label; regular expressions by their alternatives."""
    for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expression):
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            yield name, label, value.split("|") if "~" in operator else [value]


def problems(expression: str) -> list[str]:
    """Names, labels and values of labels that nothing serves: such an expression is valid, and finds nothing, ever."""
    found = [f"{name} is not declared" for name in names(expression) - _labels().keys() - recorded()]
    for name, label, values in selectors(expression):
        metric = name.split(":")[1] if ":" in name else name
        labels = _labels().get(metric) or _labels().get(f"{metric}_total") or set()
        if label not in labels | TARGET_LABELS:
            found.append(f"{name} has no label {label}")
        known = _values().get(metric, {}).get(label)
        found += [
            f'{name} is never {label}="{value}"'
            for value in values
            if known and not any(re.fullmatch(value, each) for each in known)
        ]
    return found


@cache
def _labels() -> dict[str, set[str]]:
    return {metric.series: set(metric.labels) for metric in [*NODE, *RUN]} | _OTHERS


@cache
def _values() -> dict[str, dict[str, set[str]]]:
    """Series -> label -> the values that it may have, where they are known beforehand: from a run without history."""
    facts = Facts.of(config_file.override({}, []))
    found: dict[str, dict[str, set[str]]] = {
        "broadgauge_node_step_seconds": {"stat": set(STATISTICS)},
        "broadgauge_node_device_memory_allocated_bytes": {"stat": set(STATISTICS)},
        "broadgauge_node_phase_seconds": {"phase": {phase.replace(" ", "_") for phase in STEP_PHASES}},
    }
    for metric, values in run_values(RunHistory(), facts, now=0.0, disk_free_bytes=0.0).items():
        if metric.kind != "info":
            found[metric.series] = {
                label: {labels[index] for labels in values} for index, label in enumerate(metric.labels)
            }
    phases = found["broadgauge_phase_time_seconds_total"]
    return found | {"broadgauge_phase_time_seconds": phases}
