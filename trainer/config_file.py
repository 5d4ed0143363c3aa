"""Configs as text: YAML plus `a.b=value` overrides and a preset in, a `RunConfig` or a one-line error out; and back."""

import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config import RunConfig, UserError
from trainer.presets import PRESETS
from trainer.section import section_in

_S = TypeVar("_S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's floats: 1e-4 is a number, not a string. Text is UTF-8, which half of a surrogate pair is not."""

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise yaml.constructor.ConstructorError(
                problem="half of a surrogate pair is no text", problem_mark=node.start_mark
            )
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


_shown = reprlib.Repr()  # a value in a message: YAML's aliases can make one that is too long to be written out whole
_shown.maxlevel, _shown.maxstring, _shown.maxother = 3, 80, 80
_shown.maxlist = _shown.maxtuple = _shown.maxdict = 10


def parse_yaml(text: str) -> Any:
    """Raises:
    ValueError: it is none; `yaml.YAMLError` where the parser says so.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply `a.b=value` overrides, fill in the preset, validate.

    Raises:
        UserError: the file cannot be read, a key is unknown, a value has the wrong type, or the layout is impossible.
    """
    return override(read_tree(path, "the config"), overrides)


def read_tree(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; `what` is what messages call it, like "the config".

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # the second for what is not UTF-8, and for names that no file can have
        raise UserError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        tree = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # the second for a date like 2020-13-45
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of {what.removeprefix('the ')} keys, not a {type(tree).__name__}")
    return tree


def override(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Validate a nested mapping after applying `a.b=value` overrides to it (in place).

    Raises:
        UserError: an override has no such form, or the result is no valid config.
    """
    for each in overrides:
        _apply_override(tree, each)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a nested mapping (with its preset filled in); errors name the nearest known key."""
    preset = tree.get("preset")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(f"preset: unknown preset {preset!r}{suggest(str(preset), PRESETS)}")
        tree = _merge(PRESETS[preset](), tree)
    return validated(RunConfig, tree)


def validated(section: type[_S], tree: Mapping[str, Any]) -> _S:
    """Raises:
    UserError: the first thing that is wrong, with the nearest known key where one is unknown.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error, section)) from error


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, every value written out; `from_tree(parse_yaml(...))` reads it back equal."""
    return dump_tree(config.model_dump(mode="json"))


def dump_tree(tree: Mapping[str, Any]) -> str:
    """A part of a config as YAML."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


@dataclass(frozen=True)
class Difference:
    """A field in which two configs differ."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def differences(old: RunConfig, new: RunConfig) -> list[Difference]:
    a, b = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [Difference(key, a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)]


def json_schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override!r} must have the form section.key=value")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from error
    for depth, key in enumerate(keys[:-1]):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"--set {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    tree[keys[-1]] = value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = _merge(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged


def _one_line(error: ValidationError, section: type[BaseModel]) -> str:
    errors = sorted(
        error.errors(), key=lambda detail: detail["type"] != "extra_forbidden"
    )  # what a slip has left unset last
    problems = [_describe(detail, section) for detail in errors]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return problems[0] + more


def _describe(detail: Any, section: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("function-"))
    if detail["type"] == "extra_forbidden":
        return f"unknown key {where}{suggest(where, known_keys(section))}"
    if detail["type"] == "value_error":  # our own rules: already whole sentences
        return str(detail["ctx"]["error"])
    rule = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "missing":
        return f"{where}: {rule}"
    got = _shown.repr(detail["input"])
    return f"{where}: {rule}, got {got if len(got) < 80 else got[:77] + '...'}"


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, sections included."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if inner := section_in(field.annotation):
            keys += known_keys(inner[0], f"{prefix}{name}.{inner[1]}")
    return keys


def suggest(wrong: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The end of a message about an unknown name: the nearest that is known, or all of them."""
    near = [key for key in known if key.rpartition(".")[2] == wrong.rpartition(".")[2]][:1]  # in the wrong section
    near = near or difflib.get_close_matches(wrong, [key for key in known if not wrong.startswith(f"{key}.")], 1, 0.5)
    siblings = [key for key in known if key.rpartition(".")[0] == wrong.rpartition(".")[0]]
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(siblings)}"
