"""What the page of a run shows, as plain data: curves with no more points than a screen has, verdicts, tables."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from launcher.history import foresight
from launcher.history.history import RunHistory
from launcher.history.values import Facts, mfu, state_of
from trainer.events import Event
from trainer.heartbeat import STEP_PHASES

_MOST_POINTS = 1000  # of a curve
_MOST_LOOKS = 200  # at all ranks: columns of the heat strip
_SMOOTHED = ("seconds", *STEP_PHASES)
"""Curves of which the means matter; of the others the outliers do."""
_RATES = ("tokens_per_second", "mfu")


def view_of(history: RunHistory, facts: Facts, now: float) -> dict[str, Any]:
    """Of a run, as of now (Unix time)."""
    times = history.times.until(now)
    total = sum(times.values())
    return {
        "name": facts.name,
        "facts": {
            "layout": facts.layout,
            "precision": facts.precision,
            "parameters": facts.num_parameters,
            "preset": facts.preset or None,
            "device": (history.training or {}).get("device"),
            "ranks": (history.training or {}).get("ranks"),
        },
        "now": now,
        "began": history.began or 0.0,
        "state": state_of(history),
        "step": history.step,
        "num_steps": facts.schedule.num_steps,
        "tokens": facts.schedule.consumed_tokens(history.step),
        "loss": history.loss,
        "goodput": times["productive"] / total if total else None,
        "times": times,
        "remaining_seconds": _remaining(history, facts),
        "plan": foresight.of(history),
        "curves": _curves(history, facts),
        "evaluations": [_some(event, "step", "time", "loss", "uniform_loss") for event in history.evaluated],
        "judgements": [_some(event, "step", "time", "heldout_loss", "scores") for event in history.judged],
        "heldout_sources": {name: scores["loss"] for name, scores in history.heldout_sources.items()},
        "checkpoints": list(history.saves.recent),
        "marks": [_mark(event) for event in history.marks],
        "ranks": _heat(history.ranks),
        "restarts": dict(history.restarts),
        "skipped": dict(history.num_skipped),
        "rollbacks": len(history.rollbacks),
        "saves": str(history.saves),
        "data": (history.data or {}).get("datasets", {}),
    }


def _remaining(history: RunHistory, facts: Facts) -> float | None:
    seconds = history.recent_median("seconds")
    return None if seconds is None else seconds * (facts.schedule.num_steps - history.step)


def _some(event: Event, *names: str) -> dict[str, Any]:
    return {name: event[name] for name in names}


def _mark(event: Event) -> dict[str, Any]:
    """An event as a line for a person."""
    told = ("verdict", "error", "reason", "machine", "phase", "rank", "from_step", "to_step", "tier", "what")
    text = ", ".join(f"{name.replace('_', ' ')} {event[name]}" for name in told if event.get(name) is not None)
    return {"time": event["time"], "kind": event["kind"], "step": event.get("step"), "text": text}


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(history: RunHistory, facts: Facts) -> dict[str, Any]:
    """Name -> steps, times and values."""
    steps = history.steps
    step, time = (np.asarray(steps[name]) for name in ("step", "time"))
    seconds = np.asarray(steps["seconds"])
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.asarray(steps["num_samples"]) * facts.seq_length / seconds
    columns = {name: np.asarray(steps[name]) for name in ("loss", "grad_norm", "lr", "seconds", *STEP_PHASES)}
    columns["tokens_per_second"] = rate
    if (unit := mfu(history, facts, 1.0)) is not None:
        columns["mfu"] = rate * unit
    curves = {}
    for name, values in columns.items():
        of_rates = seconds if name in _RATES else None
        places, shown = _thinned(values, means=name in _SMOOTHED or name in _RATES, weights=of_rates)
        curves[name] = {"step": step[places], "time": time[places], "value": _numbers(shown)}
    return curves


def _thinned(values: np.ndarray, *, means: bool, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of at most so many points: means of stretches, or the least and the largest of each.

    Args:
        weights: of the means; of a rate its times, so that a mean is all that was done by all the time.
    """
    if len(values) <= _MOST_POINTS:
        return np.arange(len(values)), values
    num = _MOST_POINTS if means else _MOST_POINTS // 2
    edges = np.linspace(0, len(values), num + 1).astype(int)
    if means:
        weights = np.ones(len(values)) if weights is None else weights
        sums = np.add.reduceat(values * weights, edges[:-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            return edges[1:] - 1, sums / np.add.reduceat(weights, edges[:-1])
    places = set()
    for start, end in pairwise(edges):
        stretch = values[start:end]
        if not np.isnan(stretch).all():
            places |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
    chosen = np.array(sorted({*places, len(values) - 1}))
    return chosen, values[chosen]


def _numbers(values: np.ndarray) -> list[float | None]:
    """JSON knows no NaN."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def _heat(looks: Sequence[Event]) -> dict[str, Any]:
    """Own time of each rank, or of ranks in a row together, look after look; those of the last layout."""
    if not looks:
        return {"times": [], "steps": [], "seconds": [], "group": 1}
    shape = len(looks[-1]["seconds"]), looks[-1]["group"]
    same = [look for look in looks if (len(look["seconds"]), look["group"]) == shape]
    chosen = [same[place] for place in np.linspace(0, len(same) - 1, min(len(same), _MOST_LOOKS)).astype(int)]
    return {
        "times": [look["time"] for look in chosen],
        "steps": [look["step"] for look in chosen],
        "seconds": [look["seconds"] for look in chosen],
        "group": shape[1],
    }
