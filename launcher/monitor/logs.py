"""The ends of a run's logs."""

import os
from pathlib import Path

_TAIL_BYTES = 16 << 10  # of each log
_MOST_LOGS = 8
_MOST_LINES = 60


def tail_of(logs: Path) -> list[dict[str, str]]:
    """The last lines of the logs that were written last, oldest log first: each with its log's name."""
    paths = sorted((path for path in logs.glob("*.log") if path.is_file()), key=lambda path: path.stat().st_mtime)
    lines = [{"log": path.stem, "line": line} for path in paths[-_MOST_LOGS:] for line in _last_lines(path)]
    return lines[-_MOST_LINES * _MOST_LOGS :]


def _last_lines(path: Path) -> list[str]:
    with open(path, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - _TAIL_BYTES))
        text = log.read().decode(errors="replace")
    lines = text.splitlines()
    return lines[1 if size > _TAIL_BYTES else 0 :][-_MOST_LINES:]
