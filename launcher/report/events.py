"""Events of a run for a person: a line each, and the times that one asks for."""

import re
import time
from datetime import datetime

from trainer.config import UserError
from trainer.events import Event

_AGO = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_CLOCK = re.compile(r"\d{1,2}:\d{2}(:\d{2})?")
_LONGEST = 120  # characters of a field


def moment(text: str, now: float | None = None) -> float:
    """Unix time of `2h` ago, of `14:05` today, or of a time by ISO 8601, which is local unless it says otherwise.

    Raises:
        UserError: it is none of these.
    """
    now = time.time() if now is None else now
    if ago := _AGO.fullmatch(text.strip()):
        return now - float(ago[1]) * _SECONDS[ago[2]]
    try:
        if _CLOCK.fullmatch(text.strip()):
            hour, minute, *second = map(int, text.split(":"))
            return datetime.fromtimestamp(now).replace(hour=hour, minute=minute, second=sum(second)).timestamp()
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise UserError(f"--since {text!r} is no time; give 2h, 30min, 14:05 or 2026-01-31T14:05") from error


def line_of(event: Event) -> str:
    """`2026-01-31 14:05:59.250  life_failed  what=rank ...`"""
    try:
        when = datetime.fromtimestamp(event["time"]).isoformat(sep=" ", timespec="milliseconds")
    except (KeyError, TypeError, ValueError, OverflowError, OSError):  # somebody has been at the record
        when = "?"
    fields = " ".join(f"{name}={_shown(value)}" for name, value in event.items() if name not in ("time", "kind"))
    return f"{when}  {event['kind']}  {fields}"


def _shown(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = text if text.isprintable() and text and " " not in text else repr(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
