"""Events as a person reads them."""

from datetime import datetime, timedelta

import pytest

from launcher.report.events import line_of, moment
from trainer.config import UserError

NOW = datetime(2026, 1, 31, 12, 30, 15).timestamp()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("30 min", timedelta(minutes=30)),
        ("5m", timedelta(minutes=5)),
        ("1.5h", timedelta(hours=1.5)),
        ("2d", timedelta(days=2)),
        ("12:00", timedelta(minutes=30, seconds=15)),
        ("12:30:05", timedelta(seconds=10)),
        ("2026-01-31T12:00:15", timedelta(minutes=30)),
        ("2026-01-30 12:30:15", timedelta(days=1)),
    ],
)
def test_times_are_said_as_people_say_them(text: str, expected: timedelta) -> None:
    assert NOW - moment(text, NOW) == pytest.approx(expected.total_seconds(), abs=1)


def test_a_time_may_name_its_zone() -> None:
    assert moment("2026-01-31T12:00:00+00:00") == 1769860800


@pytest.mark.parametrize("text", ["", "soon", "25:00", "12:60", "3 weeks", "2026-13-01", "-1h", "1e3h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--since .* is no time; give 2h"):
        moment(text, NOW)


def test_an_event_is_one_line() -> None:
    event = {"time": NOW, "kind": "life_failed", "what": "rank", "error": "rank 1 was killed", "loss": 1.23456789}
    assert line_of(event) == ("2026-01-31 12:30:15.000  life_failed  what=rank error='rank 1 was killed' loss=1.23457")
    assert "\n" not in line_of({"time": NOW, "kind": "failed", "error": "one\ntwo"} | {"more": ""})
    assert len(line_of({"kind": "generated", "text": "x" * 10_000})) < 200
