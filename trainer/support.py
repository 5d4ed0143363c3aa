"""What can be combined with what: the one table behind the config's refusals, docs/parity.md and the parity tests.

A feature is one value of one axis, with the smallest settings that turn it on. Any two features of different axes work
together unless a limit says otherwise; a limit says why and which settings are nearest to what was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import RunConfig

Settings = Mapping[str, Any]
"""Config values by dotted key."""


@dataclass(frozen=True)
class Feature:
    """One value of an axis."""

    axis: str
    name: str
    settings: Settings
    is_on: Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Limit:
    """Features that do not work together."""

    features: tuple[str, ...]
    reason: str
    nearest: Settings
    """What to change to get the nearest combination that works."""


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("tensor", "TP", {"parallel.tensor": 2}, lambda c: c.parallel.tensor > 1),
        Feature("tensor", "SP", {"parallel.tensor": 2, "parallel.sequence": True}, lambda c: c.parallel.sequence),
        Feature("pipeline", "PP", {"parallel.pipeline": 2}, lambda c: c.parallel.pipeline > 1),
        Feature(
            "pipeline",
            "PP interleaved",
            {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
            lambda c: c.parallel.virtual_pipeline > 1,
        ),
        Feature("context", "CP", {"parallel.context": 2}, lambda c: c.parallel.context > 1),
        Feature("data", "DP ZeRO-1", {"parallel.data": 2}, lambda c: c.parallel.zero == 1),
        Feature("data", "DP ZeRO-2", {"parallel.data": 2, "parallel.zero": 2}, lambda c: c.parallel.zero == 2),
        Feature("data", "DP ZeRO-3", {"parallel.data": 2, "parallel.zero": 3}, lambda c: c.parallel.zero == 3),
        Feature("offload", "offload", {"parallel.offload": "optimizer"}, lambda c: c.parallel.offload == "optimizer"),
        Feature("recompute", "selective", {"train.recompute": "selective"}, lambda c: c.train.recompute == "selective"),
        Feature("recompute", "full", {"train.recompute": "full"}, lambda c: c.train.recompute == "full"),
        Feature("precision", "bf16", {"train.precision": "bf16"}, lambda c: c.train.precision == "bf16"),
        Feature("embeddings", "untied", {"model.tied_embeddings": False}, lambda c: not c.model.tied_embeddings),
        Feature("attention", "banded", {"model.attention_window": 8}, lambda c: c.model.attention_window is not None),
        Feature("heads", "GQA", {"model.num_kv_heads": 4}, lambda c: c.model.kv_heads < c.model.num_heads),
        Feature("positions", "rotary", {"model.positions": "rotary"}, lambda c: c.model.positions == "rotary"),
        Feature("norm", "RMSNorm", {"model.norm": "rms"}, lambda c: c.model.norm == "rms"),
        Feature("order", "post-norm", {"model.norm_placement": "post"}, lambda c: c.model.norm_placement == "post"),
        Feature("activation", "SwiGLU", {"model.activation": "swiglu"}, lambda c: c.model.activation == "swiglu"),
        Feature("biases", "no biases", {"model.biases": "none"}, lambda c: c.model.biases == "none"),
    )
}

LIMITS: tuple[Limit, ...] = ()


def problems(config: RunConfig) -> Iterator[str]:
    """The limits that a config runs into, each as one line: the features, the reason, the nearest way out."""
    for limit in LIMITS:
        if all(FEATURES[name].is_on(config) for name in limit.features):
            way_out = " and ".join(f"{key} {value}".replace("True", "true") for key, value in limit.nearest.items())
            yield f"{' with '.join(limit.features)} is not supported: {limit.reason}; the nearest that works: {way_out}"


def limit_of(*features: Feature) -> Limit | None:
    """The limit that forbids turning these features on together, if one does."""
    settings = combined(*features).items()
    for limit in LIMITS:
        if all(FEATURES[name].settings.items() <= settings for name in limit.features):
            return limit
    return None


def combined(*features: Feature) -> dict[str, Any]:
    """The settings that turn all of them on."""
    return {key: value for feature in features for key, value in feature.settings.items()}


def pairs() -> Iterator[tuple[Feature, Feature]]:
    """Any two features of different axes."""
    return ((one, other) for one, other in combinations(FEATURES.values(), 2) if one.axis != other.axis)
