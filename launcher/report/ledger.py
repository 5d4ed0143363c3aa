"""The ledger of a run for a person: a verdict, a screen of tables."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from launcher.report.display import Display
from trainer.data.batches import Draws
from trainer.data.ledger.order import PlacedStep
from trainer.data.ledger.report import EpochUse, Ledger

_ROWS = 20  # of findings, and of steps left out, before they are only counted


def verdict(ledger: Ledger) -> str:
    """One line."""
    done = f"steps {ledger.first_step:,} to {ledger.last_step:,} of {ledger.num_steps:,}"
    if ledger.findings:
        return f"{done}: not proved, {_count(len(ledger.findings), 'finding')}"
    left_out = sum(stretch.last_step - stretch.first_step + 1 for stretch in ledger.left_out)
    but = f", {_count(left_out, 'step')} left out" if left_out else ""
    return f"{done}: each sample used exactly once an epoch{but}; {_compared(ledger)}"


def show(ledger: Ledger, display: Display) -> None:
    for line in _lines(ledger):
        display.line(f"  {line}")
    display.show(_epochs(ledger))
    if ledger.left_out:
        display.show(_left_out(ledger))
    for finding in ledger.findings[:_ROWS]:
        display.line(f"  finding: {finding}")
    if len(ledger.findings) > _ROWS:
        display.line(f"  and {len(ledger.findings) - _ROWS:,} more, which --json lists")


def _lines(ledger: Ledger) -> list[str]:
    lines = [
        f"{_count(ledger.num_computed, 'step')} computed; {_count(ledger.num_restarts, 'restart')} voided "
        f"{ledger.num_voided_by_restart:,} of them, {_count(ledger.num_rollbacks, 'rollback')} "
        f"{ledger.num_voided_by_rollback:,}",
        f"{_count(ledger.num_checkpoints_compared, 'checkpoint')} compared, {ledger.num_checkpoints_gone:,} gone",
    ]
    if ledger.first_step > 1:
        lines.append(f"begins from {ledger.begins_from}: steps 1 to {ledger.first_step - 1:,} are in that run's ledger")
    return lines + [f"note: {note}" for note in ledger.notes]


def _compared(ledger: Ledger) -> str:
    """Whether that is by the tokens, or by what steps say of themselves."""
    if not ledger.num_steps_compared:
        return "tokens not compared with the data"
    return f"tokens of {_count(ledger.num_steps_compared, 'step')} compared with the data"


def _epochs(ledger: Ledger) -> Table:
    """A row for each data set."""
    table = Table(box=None, pad_edge=False)
    titles = ("data set", "windows", "epochs done", "of the next", "learned from", "left out")
    for title in (*titles, "elsewhere") if ledger.first_step > 1 else titles:
        table.add_column(title, justify="left" if title == "data set" else "right")
    by_name = sorted(ledger.epochs, key=lambda use: use.dataset)
    for name, group in groupby(by_name, key=lambda use: use.dataset):
        uses: list[EpochUse] = list(group)
        under_way = [use for use in uses if not use.is_finished]
        share = under_way[-1].num_drawn / under_way[-1].num_windows if under_way else 0.0
        row = [name, f"{uses[0].num_windows:,}", f"{len(uses) - len(under_way):,}", f"{share:.1%}"]
        row += [f"{sum(use.num_learned for use in uses):,}", f"{sum(use.num_left_out for use in uses):,}"]
        row.append(f"{sum(use.num_elsewhere for use in uses):,}")
        table.add_row(*row[: len(table.columns)])
    return table


def _left_out(ledger: Ledger) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("steps left out", "samples", "reason"):
        table.add_column(title)
    for stretch in ledger.left_out[:_ROWS]:
        steps, samples = (
            f"{first:,}" if first == last else f"{first:,} to {last:,}"
            for first, last in ((stretch.first_step, stretch.last_step), (stretch.first_sample, stretch.last_sample))
        )
        table.add_row(steps, samples, stretch.reason)
    if len(ledger.left_out) > _ROWS:
        table.add_row(f"and {len(ledger.left_out) - _ROWS:,} more, which --json lists")
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def step_samples(step: PlacedStep, draws: Draws, names: Sequence[str]) -> dict[str, Any]:
    """A step and its samples, as JSON."""
    places = zip(draws.datasets.tolist(), draws.epochs.tolist(), draws.windows.tolist(), strict=True)
    return {
        "step": step.record.number,
        "reason": step.record.reason,
        "samples": [
            {"sample": step.first_sample + number, "dataset": names[dataset], "epoch": epoch + 1, "window": window}
            for number, (dataset, epoch, window) in enumerate(places)
        ],
    }


def show_step(used: dict[str, Any], display: Display) -> None:
    reason = f"; left out: {used['reason']}" if used["reason"] else ""
    display.line(f"step {used['step']:,}: {_count(len(used['samples']), 'sample')}{reason}")
    table = Table(box=None, pad_edge=False)
    for title in ("sample", "data set", "epoch", "window"):
        table.add_column(title, justify="left" if title == "data set" else "right")
    for each in used["samples"]:
        table.add_row(f"{each['sample']:,}", each["dataset"], f"{each['epoch']:,}", f"{each['window']:,}")
    display.show(table)
