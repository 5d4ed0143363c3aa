"""What was planned beside what was measured, for a person."""

from collections.abc import Callable, Mapping

from launcher.history.foresight import Comparison
from launcher.report.planning import duration

_GIB = 2**30
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "step_seconds": ("step", duration),
    "tokens_per_second": ("tokens/s", lambda rate: f"{rate:,.0f}"),
    "mfu": ("MFU", lambda share: f"{share:.1%}"),
    "memory_bytes": ("memory", lambda amount: f"{amount / _GIB:.2f} GiB"),
}


def short_line(found: Comparison) -> str:
    """`step 0.41 s, predicted 0.38 s (+8 %); memory 0.61 GiB, predicted 0.58 GiB (+5 %)`"""
    return _line({name: found[name] for name in ("step_seconds", "memory_bytes")})


def line(found: Comparison) -> str:
    """The same with tokens a second and MFU."""
    return _line(found)


def _line(found: Comparison) -> str:
    return "; ".join(f"{_SHOWN[name][0]} {_told(found[name], _SHOWN[name][1])}" for name in found)


def _told(pair: Mapping[str, float | None], shown: Callable[[float], str]) -> str:
    planned, measured = pair["planned"] or 0.0, pair["measured"]
    if measured is None:
        return f"predicted {shown(planned)}"
    off = f" ({measured / planned - 1:+.0%})" if planned > 0 else ""
    return f"{shown(measured)}, predicted {shown(planned)}{off}"
