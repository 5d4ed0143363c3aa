"""Checkpoints for a person: the list, the verdicts, the facts, the differences."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from launcher.report.display import Display
from launcher.verbs.checkpoints import Comparison, Entry, Pruned, Survey, Verdict, config_of, tokens_of
from trainer.checkpoint.format.chunk_file import Shape
from trainer.checkpoint.format.manifest import Manifest
from trainer.config import UserError
from trainer.plan import num_parameters

if TYPE_CHECKING:
    from trainer.checkpoint.format.comparison import Statistics

_MOST_ROWS = 20  # of differences, for one screen; --json has all


def _table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in columns:
        table.add_column(title, justify="left" if title in left else "right", overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """A row of plain text: names and errors may hold what rich takes for markup."""
    table.add_row(*map(Text, cells))


def age(seconds: float) -> str:
    """`3 h`: the largest unit of which there are two."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


# ---------------------------------------------------------------------------------------------------------------- list


def show_survey(survey: Survey, display: Display) -> None:
    table = _table("step", "tokens", "held-out loss", "size", "files", "age", "state", left=("state",))
    for entry in survey.entries:
        _add(table, str(entry.step), *_numbers(entry), _state(entry, survey.newest))
    display.show(table)
    written_by: dict[str, list[int]] = {}
    for entry in survey.entries:
        if entry.manifest:
            written_by.setdefault(_layout(entry.manifest), []).append(entry.step)
    for layout, steps in written_by.items():
        display.line(f"  written by {layout}" + (f": {_some(steps)}" if len(written_by) > 1 else ""))
    if survey.saves:
        display.line(f"  in all lives of the run: {survey.saves}")
    if survey.leftovers:
        names = ", ".join(path.name for path in survey.leftovers)
        display.line(f"  unfinished or left by a crash: {names}")


def _layout(manifest: Manifest) -> str:
    try:
        return config_of(manifest).parallel.describe()
    except UserError:
        return "another version, whose config this one does not know"


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) < 6 else f"{len(steps)} from {steps[0]} to {steps[-1]}"


def _numbers(entry: Entry) -> tuple[str, ...]:
    manifest = entry.manifest
    if manifest is None:
        return ("",) * 5
    return (
        f"{tokens_of(manifest):,}",
        "" if manifest.heldout_loss is None else f"{manifest.heldout_loss:.4f}",
        decimal(manifest.num_bytes),
        f"{len(manifest.files)}",
        "" if manifest.written_at is None else age(time.time() - manifest.written_at),
    )


def _state(entry: Entry, newest: int | None) -> str:
    if entry.problem:
        return entry.problem
    if newest is not None and entry.step > newest:
        return "beyond the newest"
    return ", ".join(entry.kept_for) or "goes at the next save"


# -------------------------------------------------------------------------------------------------------------- verify


def line_of(verdict: Verdict) -> str:
    if verdict.problem:
        return f"{verdict.path} {verdict.problem}"
    rate = f", {decimal(int(verdict.num_bytes / verdict.seconds))}/s" if verdict.seconds > 1 else ""
    return f"{verdict.path} is sound: {verdict.num_files} files, {decimal(verdict.num_bytes)}{rate}"


# ---------------------------------------------------------------------------------------------------------------- show


def show_manifest(path: Path, manifest: Manifest, shapes: Mapping[str, Shape], display: Display) -> None:
    config = config_of(manifest)
    model = config.model
    rows = {
        "checkpoint": str(path),
        "step": f"{manifest.step:,}, of which {manifest.num_updates:,} updated the weights",
        "consumed": f"{manifest.consumed_samples:,} sequences, {tokens_of(manifest):,} tokens",
        "held-out loss": None if manifest.heldout_loss is None else f"{manifest.heldout_loss:.4f} nats per token",
        "written": None if manifest.written_at is None else f"{age(time.time() - manifest.written_at)} ago",
        "origin": manifest.origin,
        "run": f"{config.name}, seed {config.seed}, {config.train.precision}",
        "model": f"{num_parameters(model):,} parameters, {model.num_layers} layers of {model.hidden_size}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_size}, context {model.seq_length}",
        "layout": f"{config.parallel.num_ranks} ranks: {config.parallel.describe()}",
        "files": f"{len(manifest.files)}, {decimal(manifest.num_bytes)}",
        **{f"data: {name}": value for name, value in manifest.data.items()},
        "consumed data": manifest.data_digest,
        **{f"state: {kind}": _total(kind, shapes) for kind in manifest.kinds},
    }
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows.items():
        if value is not None:
            _add(table, name, value)
    display.show(table)


def _total(kind: str, shapes: Mapping[str, Shape]) -> str:
    sizes = [math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{kind}/")]
    return f"{len(sizes)} tensors, {sum(sizes):,} elements, {decimal(4 * sum(sizes))}"


def show_tensors(shapes: Mapping[str, Shape], display: Display) -> None:
    table = _table("tensor", "shape", "elements", left=("tensor",))
    for name, shape in shapes.items():
        _add(table, name, _shape(shape), f"{math.prod(shape):,}")
    display.show(table)


def show_statistics(found: "Mapping[str, Statistics]", display: Display) -> None:
    table = _table("tensor", "norm", "mean", "smallest", "largest", "not finite", left=("tensor",))
    for name, of in found.items():
        numbers = (f"{each:.6g}" for each in (of.norm, of.mean, of.smallest, of.largest))
        _add(table, name, *numbers, f"{of.num_not_finite:,}")
    display.show(table)


def _shape(shape: Shape | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "scalar"


# --------------------------------------------------------------------------------------------------------------- prune


def show_pruned(pruned: Pruned, display: Display, *, dry_run: bool) -> None:
    for reason in pruned.rejected:
        display.line(f"warning: {reason.removesuffix('; trying the one before')}; it is left alone")
    for fate in pruned.fates:
        outcome = f"would be {fate.outcome}" if dry_run and fate.outcome == "removed" else fate.outcome
        display.line(f"step {fate.step}: {outcome} ({fate.why})")
    for path in pruned.leftovers:
        outcome = ("would be removed" if dry_run else "removed") if pruned.is_idle else "left: a job works in this run"
        display.line(f"{path.name}: {outcome} (unfinished)")
    display.line(f"{decimal(pruned.freed_bytes)} {'would be ' if dry_run else ''}freed")


# ---------------------------------------------------------------------------------------------------------------- diff


def show_comparison(found: Comparison, display: Display) -> None:
    for each in (*(f"config {each}" for each in found.config), *map(str, found.facts)):
        display.line(_shortened(each))
    if found.tensors:
        table = _table("tensor", "elements", "largest", "relative L2", left=("tensor",))
        for tensor in found.tensors[:_MOST_ROWS]:
            _add(table, tensor.name, *_apart(tensor))
        display.show(table)
        if len(found.tensors) > _MOST_ROWS:
            display.line(f"... and {len(found.tensors) - _MOST_ROWS} more; --json has all")
    verdict = "equal" if found.is_equal else "different"
    display.line(f"{verdict}: {len(found.tensors)} tensors differ, {found.num_equal} are equal to the last bit")


def _apart(tensor: Any) -> tuple[str, str, str]:
    first, second = tensor.shapes
    if first != second:
        return f"{_shape(first)} | {_shape(second)}", "", ""
    return f"{tensor.num_different:,} of {math.prod(first):,}", f"{tensor.max_abs:.3g}", f"{tensor.relative:.3g}"


def _shortened(line: str, most: int = 200) -> str:
    return line if len(line) <= most else f"{line[: most - 3]}..."
