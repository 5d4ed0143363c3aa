"""Prepared data for a person: a line, tables."""

from collections.abc import Sequence

from rich.table import Table

from data_pipeline.manifest import Manifest
from data_pipeline.tally import DROP_REASONS, REPAIR_REASONS
from launcher.report.display import Display
from trainer.data.blend import DatasetUse


def describe(manifest: Manifest) -> str:
    train, heldout = manifest.portions["train"], manifest.portions["heldout"]
    return (
        f"{train.documents + heldout.documents:,} documents, {(train.text_bytes + heldout.text_bytes) / 1e6:.1f} MB -> "
        f"{train.tokens:,} training and {heldout.tokens:,} held-out tokens of {manifest.vocab_size:,}"
    )


def show(manifest: Manifest, display: Display) -> None:
    """What was dropped and repaired, and why; what the user should know."""
    for table in _tables(manifest):
        display.show(table)
    for note in manifest.notes:
        display.line(f"  note: {note}")
    for bad in manifest.bad_splits:
        display.line(f"  warning: {bad.place} is not in the data: {bad.reason}")


def _tables(manifest: Manifest) -> list[Table]:
    """What is in the data by data set, and, where there is any, what was left out or mended by reason."""
    made = [_datasets(manifest)]
    if manifest.dropped or manifest.repaired:
        made.append(_reasons(manifest))
    return made


def show_epochs(uses: Sequence[DatasetUse], display: Display) -> None:
    """How much of each data set a run draws, before it starts."""
    table = Table(box=None, pad_edge=False)
    for title in ("data set", "share", "training tokens", "sequences drawn", "epochs"):
        table.add_column(title, justify="left" if title == "data set" else "right")
    for use in uses:
        table.add_row(use.name, f"{use.share:.1%}", f"{use.tokens:,}", f"{use.samples:,}", f"{use.epochs:.2f}")
    display.show(table)


def _datasets(manifest: Manifest) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("data set", "documents", "MB of text", "training tokens", "held-out tokens"):
        table.add_column(title, justify="left" if title == "data set" else "right")
    for name, portions in manifest.datasets.items():
        train, heldout = portions["train"], portions["heldout"]
        table.add_row(
            name,
            f"{train.documents + heldout.documents:,}",
            f"{(train.text_bytes + heldout.text_bytes) / 1e6:,.1f}",
            f"{train.tokens:,}",
            f"{heldout.tokens:,}",
        )
    return table


def _reasons(manifest: Manifest) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("dropped or mended")
    table.add_column("count", justify="right")
    table.add_column("what it means")
    for reason, count in manifest.dropped.items():
        table.add_row(reason, f"{count:,}", DROP_REASONS[reason])
    for reason, count in manifest.repaired.items():
        table.add_row(reason, f"{count:,}", f"mended: {REPAIR_REASONS[reason]}")
    return table
