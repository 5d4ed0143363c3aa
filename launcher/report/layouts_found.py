"""What a search for layouts has found, on one screen: a table, why the best is the best, how to use it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.planning.layout_space import Layout
from launcher.planning.planner import Plan
from launcher.planning.reasons import Alternative, Change
from launcher.planning.search import Search, Shortage, settings
from launcher.report.planning import counted, duration
from trainer.config_file import dump_tree

_GIB = 2**30
_TIGHT = 0.9  # of the memory, above which a plan's margin is thin
_SHORT_STEP_SECONDS = 3.0  # of which parts are told in milliseconds, all of them, so that they compare
_WORTH_TELLING = 0.002  # of the step or of the memory
_NAMES = {"micro_batch_size": "micro-batch", "virtual_pipeline": "chunks", "zero": "ZeRO", "recompute": "recomputation"}


def screen(search: Search) -> Group:
    """All of it."""
    num = search.num_devices
    lines: list[RenderableType] = [
        Text(f"{search.config.name} on {num:,} x {search.cluster.device}", style="bold"),
        Text(f"{search.num_layouts:,} layouts, of which {search.num_fitting:,} fit"),
        Text(""),
    ]
    if search.best:
        lines += [
            _table(search),
            Text(_LEGEND, style="dim"),
            Text(""),
            Text(f"why the first: {_summary(search.best[0])}"),
            Text("instead of it:"),
        ]
        lines += [Text(f"- {each}") for each in map(told, search.reasons)]
        lines += [Text(""), Text(_ramp(search, search.without_ramp))] if search.without_ramp else []
    elif search.shortage:
        lines += [Text(each, style="red") for each in _shortage(search, search.shortage)]
    else:
        known = " or ".join(map(str, search.possible_devices))
        fix = f"there are some for {known}" if known else "change the model or train.global_batch_size"
        lines.append(Text(f"no layout of {_devices(num)} shares this model and batch out evenly; {fix}", style="red"))
    if own := _own(search):
        lines += [Text(""), Text(own)]
    if search.best:
        lines += [Text(""), Text(_use(settings(search.config, search.best[0])))]
    return Group(*lines)


def told(alternative: Alternative) -> str:
    """What is different about another layout, and what comes of it."""
    return f"{_changed(alternative)}: {_outcome(alternative)}"


def _outcome(alternative: Alternative) -> str:
    if alternative.missing_bytes:
        most = [each for each in alternative.bytes if each.more > 0][:1]
        because = f": {_change(most[0], _gib)}" if most else ""
        speed = f", though {_percent(-alternative.slower)} faster" if alternative.slower < 0 else ""
        return f"{_gib(alternative.missing_bytes)} too much for a device{because}{speed}"
    worth = _WORTH_TELLING * alternative.best.step.seconds
    more = [_time_change(alternative, each) for each in alternative.seconds if each.more > worth][:2]
    less = [_time_change(alternative, each) for each in reversed(alternative.seconds) if each.more < -worth][:1]
    reason = ", ".join(more) + (", though " if less and more else "") + "".join(less)
    slower = alternative.slower
    speed = "as fast" if abs(slower) < 5e-5 else f"{_percent(abs(slower))} {'slower' if slower > 0 else 'faster'}"
    return f"{speed}: {reason}" if reason else speed


def _changed(alternative: Alternative) -> str:
    """The settings that differ."""
    return ", ".join(_setting(name, value) for name, value in alternative.settings.items()) or "the same"


def _setting(name: str, value: Any) -> str:
    if name == "sequence":
        return "sequence parallel" if value else "no sequence parallel"
    if name == "offload":
        return "the optimizer offloaded" if value == "optimizer" else "no offload"
    if name == "recompute":
        return f"{value if value != 'none' else 'no'} recomputation"
    return f"{_NAMES.get(name, name)} {value}"


def _time_change(alternative: Alternative, change: Change) -> str:
    if change.part == "bubble":
        best, other = alternative.best.step.seconds, alternative.other.step.seconds
        return f"bubble {change.other / other:.1%} of the step instead of {change.best / best:.1%}"
    in_ms = alternative.best.step.seconds < _SHORT_STEP_SECONDS
    return _change(change, lambda seconds: f"{1000 * seconds:,.1f} ms" if in_ms else f"{seconds:,.2f} s")


def _change(change: Change, shown: Callable[[float], str]) -> str:
    instead = f" instead of {shown(change.best)}" if change.best else ""
    return f"{change.part.replace('_', ' ')} {shown(change.other)}{instead}"


def _summary(plan: Plan) -> str:
    """Where its time goes."""
    parts = _shares(asdict(plan.step))
    told = ", ".join(f"{name} {share:.0%}" for name, share in parts)
    return f"its step is {told}; {_gib(plan.free_bytes)} of a device are free"


def _shares(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    """Of the parts that take a hundredth or more, the largest first."""
    whole = sum(parts.values())
    shares = [(name.replace("_", " "), value / whole) for name, value in parts.items() if value >= 0.01 * whole]
    return sorted(shares, key=lambda each: -each[1])


def _table(search: Search) -> Table:
    """A row for each plan, in 80 columns if nothing is out of the ordinary."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    layouts = [Layout.of(plan.config) for plan in search.best]
    for name in ("", "tp", "pp", "cp", "dp", "mb", "ZeRO"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("again", no_wrap=True)
    for name in ("GiB", "step", "tokens/s", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most else")
    for place, (plan, layout) in enumerate(zip(search.best, layouts, strict=True), 1):
        is_tight = plan.memory.total > _TIGHT * search.cluster.memory_bytes
        others = [each for each in _shares(asdict(plan.step)) if each[0] != "matrix"]
        table.add_row(
            str(place),
            f"{layout.tensor}{'+s' if layout.sequence else ''}",
            f"{layout.pipeline}" + (f"/{layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""),
            str(layout.context),
            str(layout.data),
            str(layout.micro_batch_size),
            f"{layout.zero}{'+o' if layout.offload == 'optimizer' else ''}",
            {"none": "", "selective": "part"}.get(layout.recompute, layout.recompute),
            Text(f"{plan.memory.total / _GIB:.1f}", style="yellow" if is_tight else ""),
            duration(plan.step.seconds),
            counted(plan.tokens_per_second),
            f"{plan.mfu:.1%}",
            ", ".join(f"{name} {share:.0%}" for name, share in others[:1]),
            style="bold" if place == 1 else "",
        )
    return table


_LEGEND = (
    "tp, pp, cp, dp: tensor (+s: and sequence), pipeline (stages/chunks), context, data parallel; mb: sequences of a "
    "micro-batch; +o: optimizer offloaded; again: recomputed; most else: most of the step after matrix products"
)


def _own(search: Search) -> str | None:
    if search.own is None:
        return None
    plan, rank = search.own.plan, search.own.rank
    name = f"the config's own layout ({plan.config.parallel.describe()})"
    if rank is None:
        return f"{name} does not fit: {_gib(-plan.free_bytes)} too much"
    place = f"{name} is number {rank:,} of the {search.num_fitting:,} that fit"
    if not search.best:
        return place
    beside = Alternative(search.best[0], plan)
    return f"{place}; {_outcome(beside)}" if beside.settings else f"{place}: the best"


def _shortage(search: Search, shortage: Shortage) -> Iterator[str]:
    plan = shortage.nearest
    layout = ", ".join(_setting(name, value) for name, value in Layout.of(plan.config)._asdict().items() if value)
    room = search.cluster.memory_bytes
    yield (
        f"nothing fits {_devices(search.num_devices)} of {_gib(room)}; the nearest takes {_gib(plan.memory.total)} "
        f"({_gib(-plan.free_bytes)} too much): {layout}"
    )
    parts = sorted(asdict(plan.memory).items(), key=lambda each: -each[1])[:3]
    yield f"of that, {', '.join(f'{name} {_gib(value)}' for name, value in parts)}"
    enough = shortage.enough_devices
    yield f"{_devices(enough)} would do" if enough else "no doubling of the devices that was tried would do"


def _ramp(search: Search, alternative: Alternative) -> str:
    """What the batch ramp costs, as its first size bounds replicas and micro-batches."""
    chosen = Layout.of(alternative.other.config)
    size = chosen.data * chosen.micro_batch_size * (chosen.pipeline if chosen.virtual_pipeline > 1 else 1)
    return (
        f"train.ramp_start_batch_size {search.config.train.ramp_start_batch_size} rules out layouts whose replicas do "
        f"not share it; with a multiple of {size}: {told(alternative)}"
    )


def _use(chosen: Mapping[str, Any]) -> str:
    if not chosen:
        return "the config has it already"
    return f"to use it: --set {' '.join(f'{key}={_as_yaml(value)}' for key, value in chosen.items())}"


def _as_yaml(value: Any) -> str:
    return dump_tree({"value": value}).removeprefix("value: ").strip()


def _devices(number: int) -> str:
    return f"{number:,} device{'s' if number > 1 else ''}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"


def _percent(share: float) -> str:
    return f"{share:.1%}"
