"""Writes docs/configuration.md from the config's own docstrings: `make docs`."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import RunConfig
from trainer.presets import PRESETS
from trainer.section import section_in

TARGET = Path(__file__).with_suffix(".md")

HEADER = """\
# Configuration

A run is one YAML file; `--set section.key=value ...` overrides it, and a `preset` fills in what it leaves out.
`broadgauge config show CONFIG` prints the resolved result, `broadgauge config schema` the JSON schema. An unknown key
is refused with the nearest known one. Numbers of tokens may be written as `300B`, `375M` or `4k`.

This page is made from the docstrings in `trainer/config.py` and `trainer/data_config.py` by `make docs`.
"""


def render() -> str:
    return "\n".join([HEADER, *_section(RunConfig, ""), *_presets()]) + "\n"


def _section(section: type[BaseModel], prefix: str) -> Iterator[str]:
    yield from ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if not _is_section(field):
            default = "required" if field.is_required() else _shown(field.default)
            yield f"| `{prefix}{name}` | {_type_name(field.annotation)} | {default} | {_meaning(field)} |"
    for name, field in section.model_fields.items():
        if inner := section_in(field.annotation):
            key = f"{prefix}{name}.{inner[1]}"
            yield from ["", f"## {key.removesuffix('.')}", "", _meaning(field), ""]
            yield from _section(inner[0], key)


def _presets() -> Iterator[str]:
    yield from ["", "## Presets", "", "| preset | what it is |", "|---|---|"]
    for name, preset in PRESETS.items():
        assert preset.__doc__ is not None
        yield f"| `{name}` | {preset.__doc__.strip().splitlines()[0]} |"


def _meaning(field: FieldInfo) -> str:
    """On one line, as a table needs it."""
    return " ".join((field.description or "").split())


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _without_notes(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _type_name(annotation: Any) -> str:
    annotation = _without_notes(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if section_in(annotation) and origin is None:
        return "section below"
    if origin is dict:
        values = _type_name(arguments[1])
        return f"mapping of names to {'sections below' if values == 'section below' else f'{values}s'}"
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return ", ".join("empty" if choice is type(None) else _type_name(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    return {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), "integer"
    )


def _shown(default: Any) -> str:
    if default in (None, {}, ()):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{', '.join(default) if isinstance(default, tuple) else default}`"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
