"""What a person sees while a run works: one progress bar at a time, one line for each finished stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINE_SECONDS = 15.0  # between progress lines where there is no terminal to draw a bar on


class StageBar:
    """Progress of one stage: a bar on a terminal, else a plain line now and then."""

    def __init__(self, console: Console, stage: str) -> None:
        self.result = "done"
        """One line for a person, printed when the stage ends well."""
        self._console = console
        self._stage = stage
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(stage, total=None, unit="")
        self._last_line = time.monotonic()

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        """`stage` says what is being done; `done` of `total` (None when not known) in `unit`s."""
        self._bar.update(self._task, description=escape(stage), completed=done, total=total, unit=unit)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > _PLAIN_LINE_SECONDS:
            self._last_line = now
            of_total = f" of {total:,}" if total else ""
            self._console.print(f"  {stage}: {done:,}{of_total} {unit}", markup=False, highlight=False)

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()


class Display:
    """The terminal of one command."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageBar]:
        """A stage of the run; prints its time and result unless it fails."""
        bar = StageBar(self.console, name)
        started = time.monotonic()
        bar.start()
        try:
            yield bar
        finally:
            bar.stop()
        self.line(f"{name:9} {time.monotonic() - started:6.1f} s  {bar.result}")
