"""What a person, or a script, sees while a command works: progress of one stage at a time, a line for each finished.

Modes: `auto` draws a bar on a terminal and writes plain lines elsewhere; `plain` never draws; `json` writes an object a
line, for scripts; `quiet` says only what may be wrong. Errors are said in every mode, on the other stream.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Mode = Literal["auto", "plain", "json", "quiet"]
MODES: tuple[Mode, ...] = get_args(Mode)

_LINE_SECONDS: dict[Mode, float] = {"auto": 15.0, "plain": 15.0, "json": 1.0}
"""Between two lines of progress where no bar is drawn."""


class StageBar:
    """Progress of one stage."""

    def __init__(self, display: "Display", stage: str) -> None:
        self.result = ""
        """One line for a person, printed when the stage ends well, if there is anything to say."""
        self._display, self._stage = display, stage
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(),
            console=display.console,
            transient=True,
            disable=not display.draws,
        )
        self._task = self._bar.add_task(stage, total=None, unit="")
        self._last_line = time.monotonic()
        self._whole: tuple[int, str] | None = None
        """What was done wholly when it was last heard of."""

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        """`stage` says what is being done; `done` of `total` (None when not known) in `unit`s."""
        self._bar.update(self._task, description=escape(stage), completed=done, total=total, unit=unit)
        now, whole, before = time.monotonic(), (done, unit) if done == total else None, self._whole
        self._whole = whole
        is_due = now - self._last_line > _LINE_SECONDS.get(self._display.mode, 0.0)
        # scripts see the end of everything, however little time it took
        if not self._display.draws and (is_due or (self._display.mode == "json" and whole and whole != before)):
            self._last_line = now
            self._display.progress(self._stage, stage, done, total, unit)

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()


class Display:
    """The terminal of one command."""

    def __init__(self, console: Console, mode: Mode = "auto") -> None:
        self.console, self.mode = console, mode
        self.draws = mode == "auto" and console.is_terminal
        """Whether there is a bar."""

    def line(self, text: str) -> None:
        self._say(text, "line", text=text)

    def warn(self, text: str) -> None:
        """Of what a person should see at once, in every mode."""
        if self.mode == "quiet":
            self._print(f"warning: {text}")
        self._say(f"  warning: {text}", "warning", text=text)

    def show(self, table: RenderableType) -> None:
        """For a person alone."""
        if self.mode in ("auto", "plain"):
            self.console.print(table)

    def progress(self, name: str, doing: str, done: int, total: int | None, unit: str) -> None:
        """Of a stage."""
        of_total = f" of {total:,}" if total else ""
        said = {"stage": name, "doing": doing, "done": done, "total": total, "unit": unit}
        self._say(f"  {doing}: {done:,}{of_total} {unit}", "progress", **said)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageBar]:
        """A stage of the run; prints its time and result unless it fails."""
        bar = StageBar(self, name)
        started = time.monotonic()
        if self.mode == "json":
            self._say("", "stage_started", stage=name)
        bar.start()
        try:
            yield bar
        finally:
            bar.stop()
        seconds = time.monotonic() - started
        if bar.result or self.mode == "json":
            line = f"{name:9} {seconds:6.1f} s  {bar.result}"
            self._say(line, "stage_finished", stage=name, seconds=round(seconds, 3), result=bar.result)

    def _say(self, line: str, kind: str, **fields: object) -> None:
        match self.mode:
            case "auto" | "plain":
                self._print(line)
            case "json":
                self._print(json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}))

    def _print(self, text: str) -> None:
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Text from anywhere, for a terminal, which control characters would command."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
