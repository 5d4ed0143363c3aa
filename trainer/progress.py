"""How far long work has come: heard by a callback within a process, and read from a small file by another."""

import os
from collections.abc import Callable
from pathlib import Path

Advance = Callable[[int, int], None]
"""Hears how many pieces are done, of how many."""
Update = Callable[[str, int, int | None, str], None]
"""Hears what is being done, how much of it is done, of how much (None: nobody knows), in which unit."""


def unheard(*_: object) -> None:
    """Nobody wants to know."""


def counting(update: Update, doing: str, unit: str) -> Advance:
    """For work that only counts."""
    return lambda done, total: update(doing, done, total, unit)


class ProgressFile:
    """Of a task whose result is to be the file `output`, beside it."""

    def __init__(self, output: Path) -> None:
        self._path = output.with_name(f"{output.name}.progress")

    def write(self, done: int, total: int) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{done} {total}", encoding="ascii")
        os.replace(temporary, self._path)

    def tell(self, advance: Advance) -> None:
        """What was written last, if anything was."""
        if self._path.exists():
            done, total = self._path.read_text(encoding="ascii").split()
            advance(int(done), int(total))
