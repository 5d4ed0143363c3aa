"""What is supported: the one table behind the config's refusals, docs/layouts.md and the parity tests.

`FEATURES` says what can be combined: any two features of different axes work together. `RULES` says which values fit
together; a config that breaks one is refused with the rule, the values, the reason, and the nearest settings that work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from math import gcd, isqrt, prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import RunConfig

Settings = Mapping[str, Any]
"""Config values by dotted key."""


# ----------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Feature:
    """One value of an axis, with the smallest settings that turn it on."""

    axis: str
    name: str
    settings: Settings


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("tensor", "TP", {"parallel.tensor": 2}),
        Feature("tensor", "SP", {"parallel.tensor": 2, "parallel.sequence": True}),
        Feature("pipeline", "PP", {"parallel.pipeline": 2}),
        Feature("pipeline", "PP interleaved", {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
        Feature("context", "CP", {"parallel.context": 2}),
        Feature("data", "DP ZeRO-1", {"parallel.data": 2}),
        Feature("data", "DP ZeRO-2", {"parallel.data": 2, "parallel.zero": 2}),
        Feature("data", "DP ZeRO-3", {"parallel.data": 2, "parallel.zero": 3}),
        Feature("offload", "offload", {"parallel.offload": "optimizer"}),
        Feature("recompute", "selective", {"train.recompute": "selective"}),
        Feature("recompute", "full", {"train.recompute": "full"}),
        Feature("precision", "bf16", {"train.precision": "bf16"}),
        Feature("embeddings", "untied", {"model.tied_embeddings": False}),
        Feature("attention", "banded", {"model.attention_window": 8}),
        Feature("heads", "GQA", {"model.num_kv_heads": 4}),
        Feature("positions", "rotary", {"model.positions": "rotary"}),
        Feature("norm", "RMSNorm", {"model.norm": "rms"}),
        Feature("order", "post-norm", {"model.norm_placement": "post"}),
        Feature("activation", "SwiGLU", {"model.activation": "swiglu"}),
        Feature("biases", "no biases", {"model.biases": "none"}),
    )
}


def combined(*features: Feature) -> dict[str, Any]:
    """The settings that turn all of them on."""
    return {key: value for feature in features for key, value in feature.settings.items()}


def pairs() -> Iterator[tuple[Feature, Feature]]:
    """Any two features of different axes."""
    return ((one, other) for one, other in combinations(FEATURES.values(), 2) if one.axis != other.axis)


# ----------------------------------------------------------------------------------------------------- kinds of rules

_TRIES = 100  # values to try in each direction for one that breaks no other rule


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Something that the values of several settings, or their sum, must obey."""

    why: str
    """One clause."""
    example: Settings
    """The smallest settings that break it, and no other rule, on the default config."""

    @property
    @abstractmethod
    def statement(self) -> str:
        """The rule in Markdown."""

    @abstractmethod
    def values(self, config: RunConfig) -> str | None:
        """What the config says against the rule; None where it is obeyed."""

    @abstractmethod
    def near(self, config: RunConfig) -> Iterator[Iterable[Settings]]:
        """Ways to obey it: for each direction the changes of a config that breaks it, the nearest first."""

    def alternatives(self, config: RunConfig) -> list[Settings]:
        """The nearest change in each direction that breaks no other rule; the nearest of all where every one does."""
        ways = [tries for way in self.near(config) if (tries := list(islice(way, _TRIES)))]
        sound = [next((each for each in tries if _is_sound(changed(config, each))), None) for tries in ways]
        return [each for each in sound if each is not None] or [tries[0] for tries in ways]

    def problem(self, config: RunConfig) -> str | None:
        """One line with the values, the reason and the fix; None where the rule is obeyed."""
        values = self.values(config)
        return values and f"{values}: {self.why}; use {shown(self.alternatives(config))}"


Product = tuple[int | str, ...]
"""Numbers and keys, to be multiplied."""


@dataclass(frozen=True)
class Condition:
    text: str
    holds: Callable[[RunConfig], bool]


_ALWAYS = Condition("", lambda config: True)


@dataclass(frozen=True, kw_only=True)
class Multiple(Rule):
    """`whole` is a multiple of `of`. Nothing is asked of settings that are empty."""

    whole: Product
    of: Product
    change: tuple[str, ...]
    """The keys to change, each a factor of one side."""
    instead: Settings | None = None
    """Another way to obey the rule: to leave out what asks for it."""
    when: Condition = _ALWAYS

    @property
    def statement(self) -> str:
        sides = [" x ".join(f"`{factor}`" if isinstance(factor, str) else str(factor) for factor in side)
                 for side in (self.whole, self.of)]
        return f"{sides[0]} is a multiple of {sides[1]}{self.when.text}"

    def values(self, config: RunConfig) -> str | None:
        factors = [_number(config, factor) for factor in (*self.whole, *self.of)]
        if not self.when.holds(config) or None in factors:
            return None
        if _product(config, self.whole) % _product(config, self.of) == 0:
            return None
        section = "" if len(self.whole) > 1 else _section(self.whole[-1])
        return f"{_multiplied(config, self.whole)} is not divisible by {_multiplied(config, self.of, section)}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Settings]]:
        whole, of = _product(config, self.whole), _product(config, self.of)
        for key in self.change:
            now = value_of(config, key)
            if key in self.whole:
                below, above = _multiples(of // gcd(of, whole // now), now)
            else:
                below, above = _divisors(whole, of // now, now)
            yield ({key: value} for value in below)
            yield ({key: value} for value in above)
        if self.instead is not None:
            yield [self.instead]


@dataclass(frozen=True, kw_only=True)
class Needs(Rule):
    """A setting other than `off` needs another one that is on as well."""

    key: str
    off: Any
    other: str
    other_off: Any
    other_on: Iterable[Any] = ()
    """Values that turn the other on, to be tried in this order."""

    @property
    def statement(self) -> str:
        return f"`{self.key}`{_beyond(self.off)} needs `{self.other}`{_beyond(self.other_off)}"

    def values(self, config: RunConfig) -> str | None:
        value, other = value_of(config, self.key), value_of(config, self.other)
        if value == self.off or other != self.other_off:
            return None
        needed = f"{self.other}{_beyond(self.other_off)}"
        return f"{self.key} {_text(value)} needs {needed}, which is {_text(other)}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Settings]]:
        yield [{self.key: self.off}]
        yield ({self.other: value} for value in self.other_on)


@dataclass(frozen=True, kw_only=True)
class AtMost(Rule):
    """A setting is at most another one, or below it. Nothing is asked of settings that are empty."""

    key: str
    other: str
    strictly: bool
    fix: Callable[[int, int], Settings]
    """Of both values."""

    @property
    def statement(self) -> str:
        return f"`{self.key}` is {'below' if self.strictly else 'at most'} `{self.other}`"

    def values(self, config: RunConfig) -> str | None:
        value, most = value_of(config, self.key), value_of(config, self.other)
        if not value or not most or value < most or (value == most and not self.strictly):
            return None
        return f"{self.key} {value} is {'not below' if self.strictly else 'above'} {self.other} {most}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Settings]]:
        yield [self.fix(value_of(config, self.key), value_of(config, self.other))]
