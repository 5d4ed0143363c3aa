"""The terminal of a verb that takes long, as `--progress` and `--quiet` have it."""

from contextvars import ContextVar

from rich.console import Console

from launcher.report.display import Display, Mode

_mode: ContextVar[Mode] = ContextVar("mode", default="auto")


def use(mode: Mode) -> None:
    """For the verb that follows."""
    _mode.set(mode)


def working(*, stderr: bool = False) -> Display:
    """`stderr`: the verb's own output is for machines."""
    return Display(Console(stderr=stderr), _mode.get())
