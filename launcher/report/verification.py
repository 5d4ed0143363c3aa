"""The bytes of a layout's ranks as they were built, stage by stage, and whether they are the plan's."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.verbs.verifying import Verification

if TYPE_CHECKING:
    from trainer.engine.meta_rank import BuiltRank

_SHOWN_DIFFERENCES = 10

Numbers = tuple[int, int, int, int]


def screen(found: Verification) -> Group:
    table = Table(
        title="bytes of a rank, built on the meta device", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for heading in ("stage", "tensor", "ranks", "parameters", "weights", "gradients", "optimizer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in _rows(found.ranks):
        table.add_row(*row)
    lines: list[RenderableType] = [table]
    for each in found.differences[:_SHOWN_DIFFERENCES]:
        lines.append(
            Text(f"rank {each.rank}: {each.what} {each.built:,}, planned {each.planned:,}", style="red"),
        )
    if (left := len(found.differences) - _SHOWN_DIFFERENCES) > 0:
        lines.append(Text(f"and {left:,} more differences", style="red"))
    equal, whole = found.num_equal, len(found.ranks)
    verdict = f"{equal:,} of {whole:,} ranks equal to the plan, to the byte, in {found.seconds:.0f} s"
    lines.append(Text(verdict, style="green" if equal == whole else "red"))
    return Group(*lines)


def _rows(ranks: "list[BuiltRank]") -> Iterator[tuple[str, ...]]:
    """One for stages in a row, and tensor ranks in them, that hold the same."""

    def place(rank: "BuiltRank") -> tuple[int, Numbers]:
        return rank.stage, _numbers(rank)

    groups = [(key, list(group)) for key, group in groupby(sorted(ranks, key=place), key=place)]
    stages = [(stage, numbers, _spans({rank.tensor_rank for rank in group})) for (stage, numbers), group in groups]
    done: set[int] = set()
    for index, (stage, numbers, tensor_ranks) in enumerate(stages):
        if index in done:
            continue
        same = {index: stage}
        for later in range(index + 1, len(stages)):
            follows = stages[later][0] == max(same.values()) + 1
            if follows and stages[later][1:] == (numbers, tensor_ranks):
                same[later] = stages[later][0]
        done |= same.keys()
        count = sum(len(groups[each][1]) for each in same)
        yield _spans(set(same.values())), tensor_ranks, f"{count:,}", *(f"{number:,}" for number in numbers)


def _numbers(rank: "BuiltRank") -> Numbers:
    return rank.num_parameters, rank.weights, rank.gradients, rank.optimizer


def _spans(numbers: set[int]) -> str:
    """`{0, 1, 2, 5}` as 0-2, 5."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
