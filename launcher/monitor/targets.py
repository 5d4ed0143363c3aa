"""Where Prometheus finds the endpoints of a run: a file for its `file_sd_configs`, as they come and go."""

import os
from collections.abc import Sequence
from pathlib import Path

import orjson


class Targets:
    """The file of one run."""

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run = path, run
        self._written: tuple[str, ...] | None = None

    def write(self, addresses: Sequence[str]) -> None:
        """Whole or not at all; nothing where nothing has changed.

        Raises:
            OSError: the disk does not take it.
        """
        if self._written == (wanted := tuple(addresses)):
            return
        found = [{"targets": list(wanted), "labels": {"run": self._run}}]
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        temporary.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
        os.replace(temporary, self._path)
        self._written = wanted

    def remove(self) -> None:
        """Nothing is to be found there any more."""
        self._path.unlink(missing_ok=True)
        self._written = None
