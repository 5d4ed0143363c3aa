"""What a place for curves must be able to do, and what it is told of each event."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Protocol

from launcher.history.history import RunHistory
from launcher.history.values import Facts, mfu
from trainer.config import RunConfig, UserError
from trainer.events import Event

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Name of a sink, and of the extra that installs it -> package."""


class Sink(Protocol):
    remakes: bool
    """Whether it begins anew with every command, and is to be told the whole record."""

    def add(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Values at a step, at a Unix time."""

    def void_after(self, step: int) -> None:
        """Steps after this one come again."""

    def close(self) -> None: ...


def check(config: RunConfig) -> None:
    """Raises:
    UserError: the package of a sink is not installed.
    """
    for name in config.monitoring.sinks:
        if find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"monitoring.sinks has {name}, and its package is not installed; pip install 'broadgauge[{name}]'"
            )


def values_of(event: Event, history: RunHistory, facts: Facts) -> dict[str, float]:
    """By the name of a curve; `history` has the event."""
    match event["kind"]:
        case "step":
            rate = event["num_samples"] * facts.seq_length / event["seconds"]
            use = mfu(history, facts, rate)
            phases = {f"phases/{name.replace(' ', '_')}": seconds for name, seconds in event["phases"].items()}
            return {
                **{f"train/{name}": event[name] for name in ("loss", "grad_norm", "lr", "tokens")},
                "speed/step_seconds": event["seconds"],
                "speed/tokens_per_second": rate,
                **({"speed/mfu": use} if use is not None else {}),
                **phases,
            }
        case "evaluated":
            datasets = event.get("datasets") or {}
            return {
                "heldout/loss": event["loss"],
                **{f"heldout/{name}/loss": scores["loss"] for name, scores in datasets.items() if len(datasets) > 1},
                **({"heldout/bits_per_byte": event["bits_per_byte"]} if event.get("bits_per_byte") else {}),
            }
        case "checkpoint_evaluated":
            return {f"tasks/{name}": value for name, value in event["scores"].items()}
        case "ranks":
            return {f"ranks/{name}_seconds": event[name] for name in ("min", "mean", "max")}
    return {}
