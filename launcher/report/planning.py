"""A plan on one screen: a bar for memory, a bar for time, numbers, warnings; and the planner beside publications."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from math import isfinite

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.planning.planner import Plan
from launcher.planning.validate import GOALS, Comparison, Goal

_GIB = 2**30
_WIDTH = 72
_COLORS = (
    *("blue", "cyan", "green", "yellow", "magenta", "red"),
    *("bright_blue", "bright_green", "bright_yellow", "white", "bright_magenta", "bright_red"),
)
_FREE = "░"
_UNITS = {
    "step_seconds": ("s a step", ".2f"),
    "hardware_tflops": ("TFLOP/s, hardware", ".1f"),
    "model_tflops": ("TFLOP/s, model", ".1f"),
    "tokens_per_second": ("tokens/s a device", ",.0f"),
    "activation_gib": ("GiB", ".2f"),
    "state_gib": ("GiB", ".2f"),
}


def screen(plan: Plan) -> Group:
    """All of it."""
    memory, step, config = asdict(plan.memory), asdict(plan.step), plan.config
    room = plan.cluster.memory_bytes
    verdict = (
        Text(f"fits, {plan.free_bytes / _GIB:.1f} GiB free", style="green")
        if plan.fits
        else Text(f"does not fit: {-plan.free_bytes / _GIB:.1f} GiB too much", style="red")
    )
    where = f", fullest on stage {plan.stage}" if config.parallel.pipeline > 1 else ""
    hidden = (
        [] if plan.hidden_share is None else [Text(f"computation hides {plan.hidden_share:.0%} of data's exchange")]
    )
    lines: list[RenderableType] = [
        Text(
            f"{config.name}: {plan.num_parameters:,} parameters on {plan.num_devices:,} x {plan.cluster.device} "
            f"({plan.num_nodes} machine{'s' if plan.num_nodes > 1 else ''})",
            style="bold",
        ),
        Text(config.parallel.describe()),
        Text(""),
        Text(f"memory of a rank{where}: {plan.memory.total / _GIB:.1f} of {room / _GIB:.1f} GiB, ").append(verdict),
        bar(memory, max(room, plan.memory.total)),
        legend(memory, lambda value: f"{value / _GIB:.2f} GiB"),
        Text(""),
        Text(f"time of a step: {duration(plan.step.seconds)} for {counted(config.tokens_per_step)} tokens"),
        bar(step, plan.step.seconds),
        legend(step, duration),
        *hidden,
        Text(""),
        _numbers(plan),
    ]
    lines += [Text(f"warning: {each}", style="yellow") for each in plan.advice]
    return Group(*lines)


def bar(parts: Mapping[str, float], whole: float) -> Text:
    """Each part as long as its share of the whole, to the nearest cell of all before it."""
    text, so_far, drawn = Text(), 0.0, 0
    for color, value in zip(_COLORS, parts.values(), strict=False):
        so_far += value
        until = round(_WIDTH * so_far / whole)
        text.append("█" * (until - drawn), style=color)
        drawn = until
    return text.append(_FREE * (_WIDTH - drawn), style="dim")


def legend(parts: Mapping[str, float], shown: Callable[[float], str]) -> Columns:
    """The parts that there are, each beside its colour."""
    items = zip(_COLORS, parts.items(), strict=False)
    return Columns(
        [
            Text("█ ", style=color, no_wrap=True).append(f"{name.replace('_', ' ')} {shown(value)}", style="default")
            for color, (name, value) in items
            if value > 0
        ],
        padding=(0, 2),
    )


def validation(comparisons: Sequence[Comparison]) -> Group:
    """Every published row, system by system, and which goals are reached."""
    lines: list[RenderableType] = []
    for system, rows in groupby(comparisons, lambda each: each.row.system):
        lines += [*_compared(system, list(rows)), Text("")]
    return Group(*lines, *(Text(_told(goal, list(comparisons))) for goal in GOALS))


def _compared(system: str, rows: list[Comparison]) -> tuple[Text, Table]:
    unit, digits = _UNITS[rows[0].row.quantity]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", min_width=8, no_wrap=True)
    for heading in ("published", "predicted", "error"):
        table.add_column(heading, min_width=10, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each in rows:
        table.add_row(
            each.row.name,
            format(each.row.published, digits),
            format(each.predicted, digits),
            Text(f"{each.error:+.1%}", style="red" if each.is_missed else ""),
            "fitted" if each.row.is_fitted else "",
        )
    return Text(f"{system}: {unit}", style="bold"), table


def _told(goal: Goal, comparisons: list[Comparison]) -> str:
    value = goal.value(comparisons)
    return f"{'reached' if value <= goal.limit else 'MISSED '}  {goal.name}: {value:.1%}, at most {goal.limit:.0%}"


def _numbers(plan: Plan) -> Table:
    speed, tokens = plan.tokens_per_second, plan.config.train.total_tokens
    condition = " if nothing fails" if plan.wall.knows_failures else ""
    rows = [
        ("speed", f"{counted(speed)} tokens/s, {counted(speed / plan.num_devices)} a device"),
        (
            "use of the peak",
            f"MFU {plan.mfu:.1%} at {counted(plan.model_flops_per_token)} operations a token, HFU {plan.hfu:.1%} at "
            f"{counted(plan.hardware_flops_per_token)}",
        ),
        ("the run", f"{counted(tokens)} tokens in {duration(plan.seconds)}{condition}"),
        *_failures(plan),
    ]
    if not isfinite(plan.device_hours):  # as the row with failures says
        return _table(rows)
    rows.append(("device-hours", f"{plan.device_hours:,.{0 if plan.device_hours > 10 else 1}f}"))
    if plan.energy_kwh is not None:
        rows.append(("energy", f"{plan.energy_kwh:,.0f} kWh"))
    if plan.price is not None:
        rows.append(("price", f"{plan.price:,.0f}"))
    return _table(rows)


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _failures(plan: Plan) -> list[tuple[str, str]]:
    """How long the run is expected to take, what spares and snapshots do for it, and when it had better save."""
    wall, spares = plan.wall, plan.config.launch.spares
    if not wall.knows_failures:
        return []
    others = [f"{wall.goodput_with(0):.1%} without spares" if spares else f"{wall.goodput_with(1):.1%} with a spare"]
    if plan.config.checkpoint.snapshot_every_steps:
        others.append(f"{wall.goodput_without_snapshots:.1%} without snapshots")
    if wall.best_goodput - wall.goodput >= 0.001:
        others.append(f"{wall.best_goodput:.1%} saving every {wall.best_interval_steps:,}")
    expected = duration(plan.expected_seconds) if wall.goodput else "never done"
    return [
        ("with failures", f"{expected}, one failure every {duration(wall.seconds_between_failures)}"),
        ("goodput", f"{wall.goodput:.1%} saving every {wall.interval_steps:,} steps; {', '.join(others)}"),
    ]


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def counted(number: float) -> str:
    """In the unit that reads best."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
