"""Kinds of rules that settings must obey together, and the search for the nearest settings that do.

The rules themselves are in `trainer.support`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import gcd, isqrt, prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import RunConfig

Settings = Mapping[str, Any]
"""Config values by dotted key."""
Change = tuple[str, Any]
"""A dotted key and another value for it."""

_NAMES = {"model.padded_vocab_size": "the padded vocabulary"}  # what messages call a value that is no setting
NUM_TRIES = 100  # values to try in each direction for one that breaks no other rule


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule(ABC):
    """Something that settings must obey together."""

    why: str
    """One clause."""
    example: Settings
    """The smallest settings that break it, and no other rule, on the default config."""
    yields: bool = False
    """Whether mending another rule may break this one, as it is easily obeyed afterwards."""

    @property
    @abstractmethod
    def statement(self) -> str:
        """The rule in Markdown."""

    @abstractmethod
    def values(self, config: RunConfig) -> str | None:
        """The values that break the rule, in words; None where it is obeyed."""

    @abstractmethod
    def near(self, config: RunConfig) -> Iterator[Iterable[Change]]:
        """Ways to obey it: for each direction the changes of a config that breaks it, the nearest first."""

    def alternatives(self, config: RunConfig, rules: Sequence[Rule]) -> list[Change]:
        """The nearest change in each direction that obeys this rule and breaks no further one of `rules`.

        Where every change breaks another one, those that break only rules which yield to it.
        """
        ways = [list(islice(way, NUM_TRIES)) for way in self.near(config)]
        others = {*broken(config, rules)} - {self}
        for may_break in (others, others | {rule for rule in rules if rule.yields}):
            sound = (
                (each for each in way if may_break.issuperset(broken(changed(config, dict([each])), rules)))
                for way in ways
            )
            if nearest := [each for way in sound for each in islice(way, 1)]:
                return nearest
        return []

    def refusal(self, config: RunConfig, rules: Sequence[Rule]) -> str:
        """One line for a config that breaks it: the values, the reason, and the fix."""
        return f"{self.values(config)}: {self.why}; use {shown(self.alternatives(config, rules))}"


Product = tuple[int | str, ...]
"""Numbers and keys, to be multiplied."""


@dataclass(frozen=True)
class Condition:
    text: str
    holds: Callable[[RunConfig], bool]


_ALWAYS = Condition("", lambda config: True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Multiple(Rule):
    """`whole` is a multiple of `of`. Nothing is asked of settings that are empty."""

    whole: tuple[str, ...]
    of: Product
    change: tuple[str, ...]
    """The keys to change, each a factor of one side."""
    instead: Change | None = None
    """Another way to obey the rule: to leave out what asks for it."""
    when: Condition = _ALWAYS

    @property
    def statement(self) -> str:
        return f"{_quoted(self.whole)} is a multiple of {_quoted(self.of)}{self.when.text}"

    def values(self, config: RunConfig) -> str | None:
        if not self.when.holds(config) or _has_empty(config, self.whole + self.of):
            return None
        if _product(config, self.whole) % _product(config, self.of) == 0:
            return None
        section = self.whole[-1].partition(".")[0]
        return f"{_multiplied(config, self.whole)} is not divisible by {_multiplied(config, self.of, section)}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Change]]:
        whole, of = _product(config, self.whole), _product(config, self.of)
        for key in self.change:
            now = _value(config, key)
            if key in self.whole:
                below, above = _multiples(of // gcd(of, whole // now), now)
            else:
                below, above = _divisors(whole, of // now, now)
            yield ((key, value) for value in below)
            yield ((key, value) for value in above)
        if self.instead is not None:
            yield [self.instead]


@dataclass(frozen=True, kw_only=True, eq=False)
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
        value, other = _value(config, self.key), _value(config, self.other)
        if value == self.off or other != self.other_off:
            return None
        needed = f"{self.other}{_beyond(self.other_off)}"
        return f"{self.key} {text_of(value)} needs {needed}, which is {text_of(other)}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Change]]:
        yield [(self.key, self.off)]
        yield ((self.other, value) for value in self.other_on)


@dataclass(frozen=True, kw_only=True, eq=False)
class AtMost(Rule):
    """A setting is at most another one, or below it. Nothing is asked of settings that are empty or 0."""

    key: str
    other: str
    strictly: bool = False
    fixes: Callable[[int, int], tuple[Change, ...]]
    """Of the two values."""

    @property
    def statement(self) -> str:
        return f"`{self.key}` is {'below' if self.strictly else 'at most'} `{self.other}`"

    def values(self, config: RunConfig) -> str | None:
        value, most = _value(config, self.key), _value(config, self.other)
        if not value or not most or value < most or (value == most and not self.strictly):
            return None
        return f"{self.key} {value} is {'not below' if self.strictly else 'above'} {self.other} {most}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Change]]:
        fixes = self.fixes(_value(config, self.key), _value(config, self.other))
        return ([fix] for fix in fixes)


@dataclass(frozen=True, kw_only=True, eq=False)
class AtLeast(Rule):
    key: str
    least: int

    @property
    def statement(self) -> str:
        return f"`{self.key}` is at least {self.least}"

    def values(self, config: RunConfig) -> str | None:
        value = _value(config, self.key)
        return None if value >= self.least else f"{self.key} {value} is not at least {self.least}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Change]]:
        yield [(self.key, self.least)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Equal(Rule):
    """Two products are equal. Nothing is asked of settings that are empty."""

    left: Product
    right: Product
    change: tuple[str, ...]
    """The keys to change, each a factor of one side."""
    instead: Change

    @property
    def statement(self) -> str:
        return f"{_quoted(self.left)} equals {_quoted(self.right)}"

    def values(self, config: RunConfig) -> str | None:
        if _has_empty(config, self.left + self.right) or _product(config, self.left) == _product(config, self.right):
            return None
        return f"{_multiplied(config, self.left)}, but {_multiplied(config, self.right)}"

    def near(self, config: RunConfig) -> Iterator[Iterable[Change]]:
        for key in self.change:
            mine, other = (self.left, self.right) if key in self.left else (self.right, self.left)
            value, rest = divmod(_product(config, other), _product(config, mine) // _value(config, key))
            yield [] if rest else [(key, value)]
        yield [self.instead]


# -------------------------------------------------------------------------------------------------- configs and words


def broken(config: RunConfig, rules: Iterable[Rule]) -> Iterator[Rule]:
    """Those of the rules that the config does not obey."""
    return (rule for rule in rules if rule.values(config))


def changed(config: RunConfig, settings: Settings) -> RunConfig:
    """A copy with other values in its sections, not validated."""
    for key, value in settings.items():
        section, _, field = key.partition(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={field: value})})
    return config


def shown(changes: Iterable[Change]) -> str:
    """Changes to choose from, in words: `4 or 6 for parallel.tensor, or ...`."""
    values: dict[str, list[str]] = {}
    for key, value in changes:
        values.setdefault(key, []).append(text_of(value))
    return ", or ".join(f"{' or '.join(each)} for {key}" for key, each in values.items())


def text_of(value: Any) -> str:
    """A value as the user writes it, with a word for nothing."""
    return "empty" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------ values and products


def _value(config: RunConfig, key: str) -> Any:
    return attrgetter(key)(config)


def _has_empty(config: RunConfig, factors: Product) -> bool:
    return any(isinstance(factor, str) and _value(config, factor) is None for factor in factors)


def _product(config: RunConfig, factors: Product) -> int:
    return prod(factor if isinstance(factor, int) else _value(config, factor) for factor in factors)


def _multiplied(config: RunConfig, factors: Product, section: str = "") -> str:
    """`parallel.tensor 2 x pipeline 4 = 8`: a key names its section where it is not the one before."""
    words = []
    for factor in factors:
        if isinstance(factor, int):
            words.append(str(factor))
            continue
        before, (section, _, field) = section, factor.partition(".")
        name = _NAMES.get(factor) or (field if section == before else factor)
        words.append(f"{name} {_value(config, factor)}")
    return " x ".join(words) + (f" = {_product(config, factors)}" if len(factors) > 1 else "")


def _quoted(factors: Product) -> str:
    return " x ".join(
        _NAMES.get(factor) or f"`{factor}`" if isinstance(factor, str) else str(factor) for factor in factors
    )


def _beyond(off: Any) -> str:
    """What a setting must be to be on."""
    return "" if off is None or off is False else f" above {off}"


def _multiples(step: int, near: int) -> tuple[Iterable[int], Iterable[int]]:
    """The multiples of `step` on both sides of `near`, which is none; the nearest first."""
    below = near // step * step
    return range(below, 0, -step), count(below + step, step)


def _divisors(whole: int, rest: int, near: int) -> tuple[Iterable[int], Iterable[int]]:
    """The numbers on both sides of `near` that divide `whole` together with `rest`; the nearest first."""
    if whole % rest:
        return (), ()
    number = whole // rest
    low = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    every = sorted({*low, *(number // divisor for divisor in low)})
    return [d for d in reversed(every) if d < near], [d for d in every if d > near]
