"""Writes docs/events.md from what trainer/events.py says of events: `make docs`."""

import re
from collections.abc import Iterator
from pathlib import Path

from trainer import events

TARGET = Path(__file__).with_suffix(".md")

HEADER = f"""\
# The record of a run

`events.jsonl` in a run's folder says everything that has happened to it, one JSON object a line. All that Broadgauge
shows is drawn from it: progress, `broadgauge status`, the page, reports, metrics, the ledger of data. `broadgauge
events RUN` prints it, `--kind` and `--since` choose, `--json` leaves it as it is.

This is schema {events.SCHEMA}; the event `command_started` of every command says its own. Within one schema kinds and
fields are added, never changed or taken away, so pass over what you do not know. Broadgauge refuses a record of a later
schema.

- Every event has `time` (Unix seconds) and `kind`.
- Several processes append; a line is written at once, and is on the disk within a second. After a crash the last line
  may be torn: pass over what is no JSON. The next writer begins a new line.
- The file may be rotated under its writers (`mv events.jsonl events.jsonl.1`): they go on in a new one within a second,
  and every reader here reads the numbered ones first; one that follows the record reads on for a minute in those put
  aside while it follows, where writers may still add lines. Compressed ones are not read.
- A restart or a rollback makes steps void: after `training_started` or `rolled_back` the steps behind its `step` or
  `to_step` no longer count, and come again.

This page is made from the docstring of `trainer/events.py` by `make docs`.

| kind | fields |
|---|---|
"""


def render() -> str:
    return HEADER + "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    table = (events.__doc__ or "").partition("depends on the kind:\n")[2]
    for kind, text in re.findall(r"^    (\w+) +(.*(?:\n {8,}.*)*)", table, flags=re.MULTILINE):
        yield f"| `{kind}` | {' '.join(text.split())} |"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
