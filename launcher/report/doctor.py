"""What the doctor has found, a line each."""

from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from launcher.doctor.finding import Finding
from launcher.report.display import Display

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def show(finding: Finding, display: Display) -> None:
    node = f"{finding.node}: " if finding.node else ""
    fix = f"; fix: {finding.fix}" if finding.fix else ""
    verdict = Text(f"{finding.verdict:8}", style=_STYLES[finding.verdict])
    line = verdict.append(f"{finding.check:14} {node}{finding.measured}{fix}", style="default")
    display.console.print(line, soft_wrap=True, highlight=False)


def show_summary(findings: Sequence[Finding], display: Display) -> None:
    counts = Counter[str](finding.verdict for finding in findings)
    display.line(", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES if counts[verdict]))
