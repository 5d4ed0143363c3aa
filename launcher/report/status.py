"""How a run is, on one screen."""

import time
from collections.abc import Callable, Iterator

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.report import foresight
from launcher.report.display import Display, printable
from launcher.verbs.runs import Status

_LOOK_SECONDS = 1.0
_BAR_WIDTH = 40


def lines_of(status: Status) -> Iterator[str]:
    """Line by line."""
    yield f"state       {status.state}" + (f" ({status.detail})" if status.detail else "")
    share = f" ({status.step / status.num_steps:.1%})" if status.num_steps else ""
    left = f", {duration(status.remaining_seconds)} left" if status.remaining_seconds else ""
    yield f"step        {status.step:,} of {status.num_steps:,}{share}{left}"
    if status.loss is not None:
        heldout = f", held-out {status.heldout_loss:.4f}" if status.heldout_loss is not None else ""
        yield f"loss        {status.loss:.4f}{heldout}"
    if status.step_seconds is not None and status.tokens_per_second is not None:
        use = f", MFU {status.mfu:.1%}" if status.mfu is not None else ""
        yield f"speed       {status.step_seconds:.3g} s a step, {status.tokens_per_second:,.0f} tokens/s{use}"
    if status.plan is not None:
        yield f"plan        {foresight.line(status.plan)}"
    if status.rank_seconds is not None:
        found = status.rank_seconds
        yield (
            f"ranks       work {found['min']:.3g} to {found['max']:.3g} s a step, mean {found['mean']:.3g}; rank "
            f"{found['slowest']:.0f} longest"
        )
    if status.goodput is not None:
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in status.times.items() if seconds >= 1)
        yield f"goodput     {status.goodput:.1%}: {spent}"
    saved = f"step {status.saved_step:,}" if status.saved_step is not None else "none"
    yield f"checkpoint  {saved} is the newest; {status.saves}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in status.restarts.items())
    yield f"ranks       were started {status.lives} times" + (f"; again because of: {reasons}" if reasons else "")
    if status.last_failure:
        yield f"failed      {status.failures} times; the last one: {status.last_failure}"
    if status.page:
        yield f"page        {status.page}"


def show(status: Status, display: Display) -> None:
    for line in lines_of(status):
        display.line(line)


def watch(look: Callable[[], Status], title: str, display: Display) -> None:
    """Until Ctrl-C, or until no command works on the run any more; on no terminal, only then."""
    if not display.draws:
        while look().state == "working":
            time.sleep(_LOOK_SECONDS)
        show(look(), display)
        return
    with Live(_screen(status := look(), title), console=display.console, auto_refresh=False) as live:
        while status.state == "working":
            time.sleep(_LOOK_SECONDS)
            live.update(_screen(status := look(), title), refresh=True)


def _screen(status: Status, title: str) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False)
    for line in lines_of(status):
        name, _, text = line.partition(" ")
        table.add_row(Text(name, style="bold"), Text(printable(text.strip())))
    bar = ProgressBar(total=max(1, status.num_steps), completed=status.step, width=_BAR_WIDTH)
    recent = [
        Text(printable(f"{time.strftime('%H:%M:%S', time.localtime(each['time']))}  {each['kind']}  {each['text']}"))
        for each in status.recent
    ]
    return Group(Text(printable(title), style="bold"), bar, table, Text(""), *recent)


def duration(seconds: float) -> str:
    """`2 h 5 min`: two units, for a person."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{seconds:.0f} s"
