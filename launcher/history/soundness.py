"""Which events are as they must be, in all that the history takes from them: others are passed over whole.

A record may have been written by another version, or by somebody's editor, or be damaged: none of that may keep the
rest from being seen.
"""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.events import Event

Check = Callable[[Any], bool]

_LARGEST = float(2**62)
_LATEST = 1e11  # Unix seconds; in the year 5138


def is_number(value: Any) -> bool:
    return type(value) in (float, int) and -_LARGEST < value < _LARGEST  # no bool, which is an int too


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_duration(value: Any) -> bool:
    return type(value) in (float, int) and 0 <= value < _LARGEST


def _is_moment(value: Any) -> bool:
    return is_number(value) and 0 <= value < _LATEST


def _maps_to(check: Check) -> Check:
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values())) and all(map(is_text, value))


def _lists(check: Check) -> Check:
    return lambda value: isinstance(value, list) and bool(value) and all(map(check, value))


def _or_none(check: Check) -> Check:
    """Also for what is not there at all."""
    return lambda value: value is None or check(value)


def _is_source(value: Any) -> bool:
    numbers = {"documents", "tokens", "share", "epochs"}
    return (
        isinstance(value, Mapping)
        and all(is_duration(value.get(name, 0)) for name in numbers)
        and _maps_to(is_count)(value.get("dropped", {}))
    )


def _is_scored(value: Any) -> bool:
    return (
        isinstance(value, Mapping) and is_number(value.get("loss")) and _or_none(is_number)(value.get("bits_per_byte"))
    )


_PLANNED = ("step_seconds", "tokens_per_second", "mfu", "memory_bytes")

_FIELDS: dict[str, dict[str, Check]] = {
    "step": {
        **dict.fromkeys(("step", "tokens", "num_samples"), is_count),
        **dict.fromkeys(("loss", "grad_norm", "lr"), is_number),
        "seconds": is_duration,
        "phases": _or_none(_maps_to(is_duration)),
    },
    "step_skipped": {"step": is_count, "num_samples": is_count, "reason": is_text},
    "training_started": {"step": is_count, "ranks": _or_none(is_count), "device": _or_none(is_text)},
    "planned": dict.fromkeys(_PLANNED, is_duration),
    "plan_checked": {
        "num_steps": is_count,
        **dict.fromkeys(("step_seconds", "tokens_per_second", "mfu"), is_duration),
        **dict.fromkeys((f"planned_{name}" for name in _PLANNED), is_duration),
        "memory_bytes": _or_none(is_duration),
    },
    "rolled_back": {"to_step": is_count},
    "evaluated": {
        "step": is_count,
        **dict.fromkeys(("loss", "uniform_loss", "unigram_loss"), is_number),
        "bits_per_byte": _or_none(is_number),
        "datasets": _or_none(_maps_to(_is_scored)),
    },
    "checkpoint_evaluated": {"step": is_count, "heldout_loss": _or_none(is_number), "scores": _maps_to(is_number)},
    "evaluation_skipped": {"step": is_count},
    "evaluation_failed": {"step": is_count, "reason": is_text},
    "life_started": {"number": is_count, "nodes": is_count},
    "life_failed": {"what": is_text, "error": is_text},
    "machine_excluded": {"machine": is_text},
    "straggler": {"phase": is_text},
    "ranks": {
        **dict.fromkeys(("step", "slowest"), is_count),
        **dict.fromkeys(("min", "mean", "max"), is_duration),
        "group": lambda value: is_count(value) and value > 0,
        "seconds": _lists(is_duration),
    },
    "blend": {"datasets": _maps_to(_is_source)},
    "checkpoint_snapshot": {"step": is_count, "seconds": is_duration},
    "checkpoint_saved": {"step": is_count, "bytes": is_count, "seconds": is_duration},
    "checkpoint_waited": {"step": is_count, "seconds": is_duration},
    "checkpoint_skipped": {"durable": lambda value: isinstance(value, bool)},
    "stage_started": {"stage": is_text},
    "stage_finished": {"stage": is_text},
    "export_verified": {"largest_difference": is_number},
}
"""Kind of event -> what is taken from it, and what that must be."""


def is_sound(event: Event) -> bool:
    checks = _FIELDS.get(event["kind"], {})
    return _is_moment(event.get("time")) and all(check(event.get(name)) for name, check in checks.items())
