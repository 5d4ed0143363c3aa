"""Templates of task files: text with `{field}` in it, and nothing else; `{{` and `}}` are braces. No code is run."""

import re
from collections.abc import Mapping

_PART = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")


def fields_of(template: str) -> tuple[str, ...]:
    """Names of the fields, each once, in the order of the template.

    Raises:
        ValueError: a brace is neither doubled nor part of a `{field}`.
    """
    names = []
    for part in _PART.finditer(template):
        if part[0] in ("{", "}"):
            raise ValueError(
                f"the brace at character {part.start()} of {template!r} begins or ends no {{field}}; double it to mean "
                "a brace"
            )
        if part[1]:
            names.append(part[1])
    return tuple(dict.fromkeys(names))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Braces in the values stay as they are."""
    return _PART.sub(lambda part: values[part[1]] if part[1] else part[0][0], template)
