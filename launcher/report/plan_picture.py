"""A plan as a picture: each pipeline stage's step as a row of time, and beside it what its ranks hold."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.planning.planner import Plan
from launcher.planning.rank_memory import RankMemory, rank_memory
from launcher.planning.step_time import StepModel
from launcher.planning.timeline import Pass, Timeline, timeline
from launcher.report.planning import counted, duration
from trainer.config import UserError

if TYPE_CHECKING:  # half a second, and only a picture needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GIB = 2**30
_SUFFIXES = (".png", ".svg", ".pdf")
_MEMORY_COLORS = ("#31688e", "#35b779", "#a5db36", "#f6a04d", "#d95f4c", "#8e63a8", "#9a9a9a", "#d2d2d2")
_SHADES = {True: ((0.62, 0.78, 0.93), (0.10, 0.33, 0.62)), False: ((0.66, 0.86, 0.62), (0.10, 0.45, 0.20))}
"""Of forward and backward passes: the first chunk's and the last one's, red, green, blue."""
_REPEATED, _WAITING, _DATA, _OPTIMIZER, _LIMIT = "#f4c95d", "#ebebeb", "#b59ad6", "#4d4d4d", "#c0392b"
_INPUT, _CHECKPOINT = "#8c564b", "#17a2b8"
_ROW = 0.84  # height of a bar, of its row
_STEADY = 2  # micro-batches of the steady part that are drawn on either side of a cut
_LEAST = 6  # and of all, where there is hardly a warm-up
_CUT_BELOW = 0.7  # cut where what would be drawn is less than this of the whole
_CHARACTER_INCHES = 0.075  # with some room
_EDGE_SHARE = 4.0  # points of white edge for an inch of a bar, or narrow ones would be all edge
_LEFT, _PASSES, _CUT, _GAP, _MEMORY = 0.75, 8.6, 0.22, 0.25, 3.6  # inches from left to right
_BELOW, _ABOVE = 0.85, 0.62  # inches, for legends and titles

Span = tuple[float, float]
"""Beginning and end of what is drawn (s)."""


@dataclass(frozen=True)
class _Step:
    """What is drawn of time: the passes, then what follows them."""

    plan: Plan
    timeline: Timeline

    @property
    def after(self) -> list[tuple[str, str, float]]:
        """What all stages do once they are done: name, colour, seconds."""
        times = self.plan.step
        parts = [
            ("optimizer", _OPTIMIZER, times.optimizer),
            ("waiting for data", _INPUT, times.input),
            ("saving, spread over steps", _CHECKPOINT, times.checkpoint),
        ]
        return [part for part in parts if part[2] > 0]

    @property
    def seconds(self) -> float:
        return self.timeline.seconds + self.plan.step.data + sum(seconds for *_, seconds in self.after)

    @property
    def num_stages(self) -> int:
        return len(self.timeline.rows)


def _rows_inches(num_stages: int) -> float:
    """Height of the rows, whatever is above and below them."""
    return min(14.0, 0.36 * max(2, num_stages) + 0.1)


def check_path(path: Path) -> None:
    """Before anything is computed.

    Raises:
        UserError: no picture can be written there.
    """
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--plot {path} names no kind of picture that can be drawn; use {', '.join(_SUFFIXES)}")
    try:
        is_folder, is_in_folder = path.is_dir(), path.absolute().parent.is_dir()
    except OSError as error:
        raise _refused(path, error) from error
    if is_folder:
        raise UserError(f"--plot {path} is a folder; name a file in it")
    if not is_in_folder:
        raise UserError(f"--plot {path} is in no folder that there is; make {path.parent}")


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"--plot {path} cannot be written: {error.strerror}; name another file")


def draw(plan: Plan, path: Path) -> None:
    """In the format that the file's name ends in."""
    from matplotlib.figure import Figure

    check_path(path)
    step = _Step(plan, timeline(StepModel(plan.config, plan.cluster)))
    shown = spans(step.timeline, step.seconds)
    rows = _rows_inches(step.num_stages)
    size = (_LEFT + _PASSES + _GAP + _MEMORY + _GAP, _BELOW + rows + _ABOVE)
    figure = Figure(figsize=size, dpi=140)

    def place(left: float, width: float, beside: "Axes | None") -> "Axes":
        box = (left / size[0], _BELOW / size[1], width / size[0], rows / size[1])
        return figure.add_axes(box, sharey=beside)

    lengths = [end - start for start, end in shown]
    free, left = _PASSES - _CUT * (len(shown) - 1), _LEFT
    first: Axes | None = None
    for number, (span, length) in enumerate(zip(shown, lengths, strict=True)):
        width = free * length / sum(lengths)
        axes = place(left, width, first)
        _draw_time(axes, step, span, width)
        _dress_time(axes, step, is_first=number == 0, is_last=number == len(shown) - 1)
        first, left = first or axes, left + width + _CUT
    memory = place(_LEFT + _PASSES + _GAP, _MEMORY, first)
    _draw_memory(memory, plan)
    _head(figure, step, shown)
    _legends(figure, step)
    try:
        figure.savefig(path)
    except OSError as error:
        raise _refused(path, error) from error


def spans(times: Timeline, seconds: float) -> list[Span]:
    """All of a step, or its beginning and its end, with a little of the steady part that is between them.

    The beginning lasts until the first stage has its first gradients back; the end is what follows the last stage's
    last forward pass.
    """
    first, last = times.rows[0], times.rows[-1]
    num = sum(each.turn.is_forward and each.turn.chunk == 0 for each in first)
    one = times.seconds / num if len(times.rows) == 1 else _steady_seconds(times)
    warm = next(each.end_seconds for each in first if not each.turn.is_forward)
    cool = max(each.start_seconds for each in last if each.turn.is_forward)
    head = max(warm + _STEADY * one, _LEAST * one)
    tail = min(cool - _STEADY * one, times.seconds - _LEAST * one)
    if head + seconds - tail > _CUT_BELOW * seconds:
        return [(0.0, seconds)]
    return [(0.0, head), (tail, seconds)]


def _steady_seconds(times: Timeline) -> float:
    """Of a micro-batch on the busiest stage."""
    num = sum(each.turn.is_forward and each.turn.chunk == 0 for each in times.rows[0])
    return max(sum(each.end_seconds - each.start_seconds for each in row) for row in times.rows) / num


# ------------------------------------------------------------------------------------------------------------ the time


def _draw_time(axes: "Axes", step: _Step, span: Span, width_inches: float) -> None:
    start, end = span
    per_inch = (end - start) / width_inches
    num_chunks = step.plan.config.parallel.virtual_pipeline
    for stage, row in enumerate(step.timeline.rows):
        place = (stage - _ROW / 2, _ROW)
        axes.broken_barh([(0.0, step.timeline.seconds)], place, facecolors=_WAITING)
        seen = [each for each in row if each.end_seconds > start and each.start_seconds < end]
        bars = [bar for each in seen for bar in _bars(each, num_chunks)]
        axes.broken_barh(
            [(left, width) for left, width, _ in bars],
            place,
            facecolors=[color for *_, color in bars],
            edgecolors="white",
            linewidths=[min(0.5, _EDGE_SHARE * width / per_inch) for _, width, _ in bars],
        )
        whole = [each for each in seen if start <= each.repeated_until_seconds and each.end_seconds <= end]
        for each in whole:
            _number(axes, each, num_chunks, per_inch)
        _draw_rest(axes, step, stage)
    axes.set_xlim(start, end)


def _bars(each: Pass, num_chunks: int) -> Iterator[tuple[float, float, tuple[float, ...] | str]]:
    """Left, width and colour."""
    again = each.repeated_until_seconds - each.start_seconds
    if again > 0:
        yield each.start_seconds, again, _REPEATED
    yield each.repeated_until_seconds, each.end_seconds - each.repeated_until_seconds, shade(each, num_chunks)


def shade(each: Pass, num_chunks: int) -> tuple[float, float, float]:
    """Darker from chunk to chunk."""
    light, dark = _SHADES[each.turn.is_forward]
    part = each.turn.chunk / max(1, num_chunks - 1)
    red, green, blue = (a + part * (b - a) for a, b in zip(light, dark, strict=True))
    return red, green, blue


def _number(axes: "Axes", each: Pass, num_chunks: int, per_inch: float) -> None:
    """Which micro-batch it is, from 1, where there is room."""
    text = str(each.turn.micro_batch + 1)
    left, right = each.repeated_until_seconds, each.end_seconds
    if (right - left) / per_inch < _CHARACTER_INCHES * len(text):
        return
    color = "white" if sum(shade(each, num_chunks)) < 1.5 else "#222222"
    axes.text((left + right) / 2, each.stage, text, ha="center", va="center", fontsize=7, color=color)


def _draw_rest(axes: "Axes", step: _Step, stage: int) -> None:
    """What replicas exchange, once a stage is done; and what comes when all are."""
    place, data, all_done = (stage - _ROW / 2, _ROW), step.plan.step.data, step.timeline.seconds
    done = step.timeline.rows[stage][-1].end_seconds
    if data > 0:
        axes.broken_barh([(all_done, data)], place, facecolors=_WAITING)
        axes.broken_barh([(done, data)], place, facecolors=_DATA, edgecolors="white", linewidth=0.3)
    left = all_done + data
    for _, color, seconds in step.after:
        axes.broken_barh([(left, seconds)], place, facecolors=color)
        left += seconds


def _dress_time(axes: "Axes", step: _Step, *, is_first: bool, is_last: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_ylim(step.num_stages - 0.5, -0.5)
    unit, size = ("s", 1.0) if step.seconds >= 2 else ("ms", 1e-3)
    num_ticks = max(2, round(axes.get_position().width * 12))
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 5, 10], prune=None if is_last else "upper"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g} {unit}"))
    axes.tick_params(labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if is_first:
        every = ceil(step.num_stages / 32)
        axes.set_yticks(
            range(0, step.num_stages, every), [f"stage {each}" for each in range(0, step.num_stages, every)]
        )
    axes.tick_params(axis="y", length=0, labelleft=is_first)
    marks = ([1.0] if not is_last else []) + ([0.0] if not is_first else [])
    for x in marks:  # two slanted strokes where the axis is cut
        axes.plot(
            [x],
            [0],
            transform=axes.transAxes,
            marker=[(-0.5, -1), (0.5, 1)],
            ms=9,
            ls="none",
            mec="#555555",
            mew=1,
            clip_on=False,
        )


# ---------------------------------------------------------------------------------------------------------- the memory


def _draw_memory(axes: "Axes", plan: Plan) -> None:
    stages = range(plan.config.parallel.pipeline)
    memories = [rank_memory(plan.config, plan.cluster, stage) for stage in stages]
    room = plan.cluster.memory_bytes / _GIB
    lefts = [0.0] * len(memories)
    for part, color in zip(fields(RankMemory), _MEMORY_COLORS, strict=True):
        values = [getattr(memory, part.name) / _GIB for memory in memories]
        axes.barh(stages, values, _ROW, lefts, color=color, edgecolor="white", linewidth=0.3)
        lefts = [left + value for left, value in zip(lefts, values, strict=True)]
    widest = max(room, *lefts)
    axes.set_xlim(0, 1.16 * widest)
    axes.axvline(room, color=_LIMIT, lw=1.2, ls="--")
    if len(memories) <= 32:
        for stage, total in zip(stages, lefts, strict=True):
            color = _LIMIT if total > room else "#444444"
            axes.text(total + 0.01 * widest, stage, f"{total:.1f}", va="center", fontsize=7, color=color)
    axes.set_title(f"memory of a rank (GiB), of {room:.1f}", fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0, labelleft=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


# --------------------------------------------------------------------------------------------------------------- words


def _head(figure: "Figure", step: _Step, shown: list[Span]) -> None:
    plan, idle = step.plan, [step.timeline.idle_seconds(stage) for stage in range(step.num_stages)]
    verdict = "fits" if plan.fits else "does not fit"
    figure.suptitle(
        f"{plan.config.name}: {counted(plan.num_parameters)} parameters on {plan.num_devices:,} x "
        f"{plan.cluster.device}, {plan.config.parallel.describe()}: {verdict}",
        fontsize=11,
        x=0.12 / figure.get_figwidth(),
        y=1 - 0.1 / figure.get_figheight(),
        ha="left",
        va="top",
    )
    num = plan.config.num_microbatches
    words = f"a step of {num} micro-batch{'es' if num > 1 else ''}: {duration(step.seconds)}"
    if step.num_stages > 1:
        words += f"; stages wait {min(idle) / step.seconds:.0%} to {max(idle) / step.seconds:.0%} of it"
    if len(shown) > 1:
        words += f"; cut out: {duration(shown[1][0] - shown[0][1])} of the same"
    figure.axes[0].set_title(words, fontsize=9, loc="left")


def _legends(figure: "Figure", step: _Step) -> None:
    from matplotlib.patches import Patch

    row, num_chunks = step.timeline.rows[0], step.plan.config.parallel.virtual_pipeline
    names = {True: "forward", False: "backward"}
    handles = []
    for is_forward, name in names.items():
        for chunk in range(num_chunks):
            one = next(each for each in row if each.turn.is_forward == is_forward and each.turn.chunk == chunk)
            words = f"{name}, chunk {chunk}" if num_chunks > 1 else name
            if 0 < chunk < num_chunks - 1:
                continue  # the shades between need no words
            handles.append(Patch(color=shade(one, num_chunks), label=words))
    if any(each.repeated_until_seconds > each.start_seconds for each in row):
        handles.append(Patch(color=_REPEATED, label="forward again"))
    if step.num_stages > 1:
        handles.append(Patch(color=_WAITING, label="waiting"))
    if step.plan.step.data > 0:
        handles.append(Patch(color=_DATA, label="between replicas"))
    handles += [Patch(color=color, label=name) for name, color, _ in step.after]
    parts = [
        Patch(color=color, label=part.name) for part, color in zip(fields(RankMemory), _MEMORY_COLORS, strict=True)
    ]
    axes, memory = figure.axes[0], figure.axes[-1]
    below = -0.38 / _rows_inches(step.num_stages)
    for place, named, ncols in ((axes, handles, ceil(len(handles) / 2)), (memory, parts, 4)):
        place.legend(
            handles=named,
            loc="upper left",
            bbox_to_anchor=(0.0, below),
            ncols=ncols,
            fontsize=7.2,
            frameon=False,
            borderaxespad=0.0,
            borderpad=0.0,
            handlelength=1.0,
            columnspacing=1.0,
        )
