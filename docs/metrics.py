"""Writes docs/metrics.md from the declarations in trainer/metrics.py: `make docs`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer import metrics
from trainer.metrics import Metric

TARGET = Path(__file__).with_suffix(".md")

HEADER = """\
# Metrics

What Prometheus finds at the endpoints of a run; [monitoring](monitoring.md) says where they are. This page is made from
the declarations in `trainer/metrics.py` by `make docs`.

Every series has the label `run` beside those below, from whatever discovers the endpoints. A value that is not known
yet, or cannot be known, is NaN. Counters go on where a new command takes over: they are counted from the run's record.
"""


def render() -> str:
    run = ["## The run", "", "Served once, by the command that works on it.", "", *_table(metrics.RUN)]
    node = [
        "## Each machine",
        "",
        "Served by its agent, also while ranks are started again.",
        "",
        *_table(metrics.NODE),
    ]
    return "\n".join([HEADER, *run, "", *node]) + "\n"


def _table(declared: Sequence[Metric]) -> Iterator[str]:
    yield from ["| series | type | labels | meaning |", "|---|---|---|---|"]
    for metric in declared:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.series}` | {metric.kind} | {labels} | {metric.help} |"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
