"""What was planned of the layout that trains, and what its first steps have shown."""

from launcher.history.history import RunHistory
from trainer.events import Event

Comparison = dict[str, dict[str, float | None]]
"""Of each quantity: planned, measured."""

QUANTITIES = ("step_seconds", "tokens_per_second", "mfu", "memory_bytes")
"""As events call them."""


def of(history: RunHistory) -> Comparison | None:
    """None where nothing is planned; nothing is measured before the plan was checked."""
    if history.plan_checked is not None:
        return compared(history.plan_checked)
    if history.planned is None:
        return None
    return {name: {"planned": history.planned[name], "measured": None} for name in QUANTITIES}


def compared(checked: Event) -> Comparison:
    """By the event `plan_checked`, for a batch of its size."""
    return {name: {"planned": checked[f"planned_{name}"], "measured": checked[name]} for name in QUANTITIES}
