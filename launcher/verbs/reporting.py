"""A run, or several beside each other, as one file of HTML that needs no server."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.history.history import RunHistory
from launcher.history.values import Facts
from launcher.history.view import view_of
from launcher.monitor import page
from launcher.monitor.logs import tail_of
from launcher.verbs import runs


def write(path: Path, out: Path | None, others: Sequence[Path]) -> Path:
    """Write the report of a run, whole or not at all, into its folder unless told; returns where it is.

    Raises:
        UserError: one of these is no run.
    """
    views = [_view(each) for each in (path, *others)]
    names = [view["name"] for view in views]
    if len(set(names)) < len(names):  # of one config: their folders tell them apart
        views = [view | {"name": str(each)} for view, each in zip(views, (path, *others), strict=True)]
    target = out or path / "report.html"
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.write_text(page.whole(views), encoding="utf-8")
    os.replace(temporary, target)
    return target


def _view(path: Path) -> dict[str, Any]:
    run_dir = runs.open_run(path)
    history = RunHistory.read(run_dir.events_path)
    state, detail = runs.state_of(run_dir, history)
    is_worked_on = state == "working"
    view = view_of(history, Facts.of(run_dir.config()), time.time() if is_worked_on else 0.0)
    told = {} if is_worked_on else {"state": state, "detail": detail}
    return {**view, **told, "log": tail_of(run_dir.logs)}
