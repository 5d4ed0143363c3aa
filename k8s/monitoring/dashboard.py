"""Writes dashboards/broadgauge.json, for Grafana, from the metrics in `trainer/metrics.py`: `make docs`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer import metrics
from trainer.metrics import NODE, Metric

TARGET = Path(__file__).parent / "dashboards" / "broadgauge.json"

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_HEIGHTS = {"stat": 4, "timeseries": 8, "table": 8, "bargauge": 8}
_UNITS = {"": "short", "seconds": "s", "bytes": "bytes", "ratio": "percentunit"}
_IN_WORDS = {"mfu": "MFU", "flops": "FLOPs"}

Look = Literal["stat", "timeseries", "table", "bargauge"]
Shown = Literal["value", "rate", "age"]
"""Its value; how much it grows in a second; how long ago a time was."""


@dataclass(frozen=True)
class Panel:
    """Shows metrics; title, description and unit are theirs."""

    metrics: tuple[Metric, ...]
    look: Look = "timeseries"
    width: int = 8
    """Of 24 columns."""
    shown: Shown = "value"
    expressions: tuple[tuple[str, str], ...] = ()
    """(expression, legend) in place of, or beside, those that follow from the metrics."""
    beside: bool = False
    stacked: bool = False
    logarithmic: bool = False
    title: str = ""
    """Where the first metric's name says too little."""


def _panel(*shown: Metric, **how: Any) -> Panel:
    return Panel(shown, **how)


_RUN = '{run=~"$run"}'
_STEPS_PER_SECOND = f"(sum by (run) (rate({metrics.STEPS.series}{_RUN}[$__rate_interval])) > 0)"
_PHASES = f"sum by (run, phase) (rate({metrics.PHASE_TIME.series}{_RUN}[$__rate_interval]))"
_FIRING = 'ALERTS{alertname=~"Broadgauge.*", alertstate="firing", run=~"$run"}'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        _panel(
            metrics.STATE,
            look="stat",
            width=4,
            expressions=((f"max by (run, state) ({metrics.STATE.series}{_RUN}) == 1", "{{run}}: {{state}}"),),
        ),
        _panel(
            metrics.GOODPUT,
            look="stat",
            width=4,
            beside=True,
            expressions=((f"run:broadgauge_time_seconds:goodput_6h{_RUN}", "{{run}}, of 6 hours"),),
        ),
        _panel(metrics.STEP, metrics.PLANNED_STEPS, look="stat", width=4),
        _panel(metrics.LOSS, look="stat", width=4),
        _panel(metrics.MFU, look="stat", width=4),
        _panel(metrics.RANKS, look="stat", width=4),
        _panel(metrics.INFO, look="table", width=16),
        _panel(look="table", expressions=((_FIRING, "{{alertname}}"),), title="Alerts that fire"),
    ),
    "Training": (
        _panel(metrics.LOSS, metrics.LOSS_MEDIAN),
        _panel(metrics.GRAD_NORM, logarithmic=True),
        _panel(metrics.LEARNING_RATE),
        _panel(metrics.EVALUATION),
        _panel(metrics.HELDOUT),
        _panel(metrics.EVALUATED, metrics.UNEVALUATED),
        _panel(metrics.EVALUATED_STEP, look="stat"),
        _panel(metrics.SKIPPED),
        _panel(metrics.ROLLBACKS, metrics.QUARANTINED, metrics.VOID_STEPS),
        _panel(metrics.CONSUMED_TOKENS, look="stat"),
        _panel(metrics.LAST_STEP, look="stat", shown="age", title="Since the last step"),
        _panel(metrics.LOSS_SCALE, look="stat"),
    ),
    "Speed": (
        _panel(metrics.STEP_DURATION, metrics.STEP_MEDIAN, metrics.PLANNED_STEP),
        _panel(
            metrics.PHASE_TIME,
            stacked=True,
            expressions=((f"{_PHASES} / on (run) group_left () {_STEPS_PER_SECOND}", "{{run}} {{phase}}"),),
            title="Phases of a step",
        ),
        _panel(metrics.RANK_STEP),
        _panel(metrics.TOKEN_RATE),
        _panel(metrics.DEVICE_TOKEN_RATE),
        _panel(metrics.MFU),
        _panel(metrics.MODEL_FLOP_RATE),
        _panel(metrics.STEPS, metrics.SAMPLES, metrics.TOKENS, shown="rate", logarithmic=True),
        _panel(metrics.STEP_TIME, shown="rate", title="Time in steps, of every second"),
        _panel(metrics.SLOWEST_RANK),
        _panel(metrics.STRAGGLERS),
    ),
    "Checkpoints": (
        _panel(metrics.SAVED_STEP, look="stat"),
        _panel(metrics.SAVED_AT, look="stat", shown="age", title="Since the newest checkpoint"),
        _panel(metrics.RUN_DISK_FREE, look="stat"),
        _panel(
            metrics.SAVED_AGE,
            beside=True,
            expressions=((f"run:broadgauge_checkpoint_timestamp_seconds:age_limit{_RUN}", "{{run}}, alert"),),
        ),
        _panel(metrics.SAVED, metrics.SAVE_SKIPPED),
        _panel(metrics.SAVE_FAILURES),
        _panel(metrics.SAVE_DURATION),
        _panel(metrics.SAVE_TIME, metrics.SAVE_STALL, shown="rate", title="Time in saves, of every second"),
        _panel(metrics.SAVED_BYTES, shown="rate"),
    ),
    "Restarts, and where the time went": (
        _panel(metrics.TIME, stacked=True, width=12),
        _panel(metrics.RESTARTS, width=6),
        _panel(metrics.LIVES, metrics.EXCLUDED, width=6),
    ),
    "Machines": (
        _panel(metrics.NODE_STEP, width=12),
        _panel(metrics.NODE_PHASE, stacked=True, width=12),
        _panel(metrics.NODE_SLOWEST_RANK),
        _panel(metrics.NODE_ALLOCATED),
        _panel(metrics.NODE_RESERVED),
        _panel(metrics.NODE_RESIDENT),
        _panel(metrics.PLANNED_MEMORY),
        _panel(metrics.NODE_RANKS),
    ),
    "Data": (
        _panel(metrics.DATA_DOCUMENTS, look="bargauge"),
        _panel(metrics.DATA_TOKENS, look="bargauge"),
        _panel(metrics.DATA_DROPPED, look="bargauge"),
    ),
}


def render() -> str:
    return json.dumps(_dashboard(), indent=1) + "\n"


def _dashboard() -> dict[str, Any]:
    run = f"label_values({metrics.STATE.series}, run)"
    return {
        "uid": "broadgauge",
        "title": "Broadgauge runs",
        "description": "Made from trainer/metrics.py by `make docs`.",
        "tags": ["broadgauge"],
        "schemaVersion": 38,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": _DATASOURCE,
                    "refresh": 2,
                    "sort": 1,
                    "definition": run,
                    "query": {"query": run, "refId": "run"},
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": _DATASOURCE,
                    "enable": True,
                    "iconColor": "red",
                    "expr": _FIRING,
                    "titleFormat": "{{alertname}}",
                    "tagKeys": "run,severity",
                }
            ]
        },
        "panels": [{"id": number, **panel} for number, panel in enumerate(_panels(), 1)],
    }


def _panels() -> Iterator[dict[str, Any]]:
    top = 0
    for title, panels in ROWS.items():
        yield {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, top, _COLUMNS, 1)}
        top += 1
        for line in _lines(panels):
            height, left = max(_HEIGHTS[panel.look] for panel in line), 0
            for panel in line:
                yield {**_drawn(panel), "gridPos": _place(left, top, panel.width, height)}
                left += panel.width
            top += height


def _lines(panels: tuple[Panel, ...]) -> list[list[Panel]]:
    """From left to right, as many as there is room for."""
    lines: list[list[Panel]] = [[]]
    for panel in panels:
        if sum(each.width for each in lines[-1]) + panel.width > _COLUMNS:
            lines.append([])
        lines[-1].append(panel)
    return lines


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _drawn(panel: Panel) -> dict[str, Any]:
    own = [] if panel.expressions and not panel.beside else [_expression(panel, each) for each in panel.metrics]
    return {
        "type": panel.look,
        "title": panel.title or _words(panel.metrics[0]),
        "description": "\n\n".join(f"{each.series}: {each.help}" for each in panel.metrics),
        "datasource": _DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                **({"instant": True, "format": "table"} if panel.look == "table" else {}),
            }
            for index, (expression, legend) in enumerate([*own, *panel.expressions])
        ],
        "fieldConfig": {"defaults": {"unit": _unit(panel), "custom": _drawing(panel)}, "overrides": []},
        "options": _options(panel),
    }


def _expression(panel: Panel, metric: Metric) -> tuple[str, str]:
    """With its legend: runs and labels, and the metric where there are several."""
    labels = ("run", *(("instance",) if metric in NODE else ()), *(each for each in metric.labels if each != "run"))
    series = f"{metric.series}{_RUN}"
    by = f"max by ({', '.join(labels)})"
    expression = {
        "value": f"{by} ({series})",
        "rate": f"{by} (rate({series}[$__rate_interval]))",
        "age": f"time() - ({by} ({series}) > 0)",
    }[panel.shown]
    said = [f"{{{{{label}}}}}" for label in labels] + ([_words(metric).lower()] if len(panel.metrics) > 1 else [])
    return expression, " ".join(said)


def _words(metric: Metric) -> str:
    """`broadgauge_step_duration_median_seconds` as "Step duration median"."""
    words = metric.name.removeprefix(f"{metrics.PREFIX}_").removesuffix(f"_{metric.unit}" if metric.unit else "")
    text = " ".join(_IN_WORDS.get(word, word) for word in words.split("_"))
    return text[0].upper() + text[1:]


def _unit(panel: Panel) -> str:
    if not panel.metrics:
        return _UNITS[""]
    unit = panel.metrics[0].unit
    if panel.shown == "rate" and not panel.expressions:
        return {"seconds": "percentunit", "bytes": "Bps"}.get(unit, "short")
    return _UNITS[unit]


def _drawing(panel: Panel) -> dict[str, Any]:
    if panel.look != "timeseries":
        return {}
    return {
        "fillOpacity": 60 if panel.stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    match panel.look:
        case "timeseries":
            return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        case "stat":
            names = panel.metrics == (metrics.STATE,)
            last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
            return {"reduceOptions": last, "textMode": "name" if names else "auto", "graphMode": "none"}
        case "bargauge":
            return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "displayMode": "basic"}
        case "table":
            return {"showHeader": True}


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")
