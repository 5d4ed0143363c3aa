"""What a check has found: the verdict, what was measured, and how to mend it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    check: str
    verdict: Verdict
    measured: str
    """With units; where nothing was, why not."""
    fix: str = ""
    """What to do; empty where all is well."""
    node: str = ""
    """The machine; empty for the only one, and for what concerns all of them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind `measured`, for machines."""


def ok(check: str, measured: str) -> Finding:
    return Finding(check, "ok", measured)


def skipped(check: str, why: str) -> Finding:
    return Finding(check, "skipped", why)


def warn(check: str, measured: str, fix: str) -> Finding:
    return Finding(check, "warn", measured, fix)


def fail(check: str, measured: str, fix: str) -> Finding:
    return Finding(check, "fail", measured, fix)


def refused(check: str, error: Exception) -> Finding:
    """A `UserError` as a finding: by its form, what follows the last semicolon is the fix."""
    measured, _, fix = " ".join(str(error).split()).rpartition("; ")
    return fail(check, measured or fix, fix if measured else "")


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict on all of them."""
    verdicts = {finding.verdict for finding in findings}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "ok"
