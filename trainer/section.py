"""What every section of a config is made of: the base class, types with units, and the error that users see."""

import re
from decimal import Decimal
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class UserError(ValueError):
    """Something the user can mend. One line: the rule, the values, the fix. The command line exits 2 on it."""


_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMBT]?)")
_EXPONENT = {"": 0, "k": 3, "K": 3, "M": 6, "B": 9, "T": 12}


def _parse_count(value: Any) -> Any:
    """'375M' -> 375000000; everything else is left for the field's own validation."""
    match = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    count = Decimal(match[1]).scaleb(_EXPONENT[match[2]])  # exact: as a float, 4.1M would be no whole number
    return int(count) if count == int(count) else value


Tokens = Annotated[int, BeforeValidator(_parse_count), Field(ge=0)]
"""A number of tokens; accepts 300B, 375M, 4k as well as plain integers."""

Strings = Annotated[
    tuple[str, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    PlainSerializer(list),
]


class Section(BaseModel):
    """Base of every section: immutable, keyword-only, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def section_in(annotation: Any) -> tuple[type[Section], str] | None:
    """The section that a field holds, if it holds any, and what stands between the keys: `NAME.` for named ones."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    between = "NAME." if get_origin(annotation) is dict else ""
    found = (section_in(argument) for argument in get_args(annotation))
    section, inner = next(filter(None, found), (None, ""))
    return (section, between + inner) if section else None
