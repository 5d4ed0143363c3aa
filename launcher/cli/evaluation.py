"""`broadgauge eval` and `broadgauge results`."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.cli.options import DataOption, SetOption
from launcher.cli.terminal import working
from trainer.config import UserError

Names = list[str] | None

_PICTURES = (".png", ".svg", ".pdf")


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A run, one of its checkpoints, or a Hugging Face folder.", show_default=False
        ),
    ],
    tasks: Annotated[
        Names, typer.Option(metavar="NAME", help="Tasks that come along (`all`, `arithmetic_*`), YAML files, folders.")
    ] = None,
    max_examples: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of each task at most.")] = None,
    contamination: Annotated[
        bool, typer.Option("--contamination", help="Tell apart which examples stand in the training text too.")
    ] = False,
    harness: Annotated[
        Names, typer.Option(metavar="NAME", help="Tasks of the lm-evaluation-harness (an extra).")
    ] = None,
    harness_folder: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder with more of the harness's tasks.")
    ] = None,
    heldout: Annotated[bool, typer.Option(help="Measure the loss on held-out text.")] = True,
    precision: Annotated[
        Literal["fp32", "bf16", "run"], typer.Option(help="Of the arithmetic; run: as in training.")
    ] = "fp32",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there.", show_default=False)] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the results beside the checkpoint.")] = False,
    data: DataOption = None,
    settings: SetOption = None,
) -> None:
    """How good a checkpoint is, or a Hugging Face folder: held-out loss, and tasks; as a table, and as JSON.

    Example: `broadgauge eval runs/quickstart --tasks larger_number,arithmetic_2d_plus --max-examples 50`
    """
    from launcher.report import evaluation as report
    from launcher.verbs import evaluating

    if out is not None:
        _check_can_be_written(out, "--out")
    wanted = evaluating.Wanted(
        _split(tasks), max_examples, contamination, _split(harness), harness_folder or (), heldout, precision, save
    )
    display = working(stderr=True)
    with display.stage("evaluate") as bar:
        found = evaluating.evaluate(path, data, settings or (), wanted, bar.update)
        if save:
            bar.result = f"kept in {evaluating.save(found)}"
    if found.results.tasks:
        display.show(report.results_table(found.results))
    _write(json.dumps(found.as_tree(), indent=2), out)


def results(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, or its folder of checkpoints.", show_default=False)
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw them over steps: .png, .svg or .pdf.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What evaluations have found of the checkpoints of a run, step by step.

    Example: `broadgauge results runs/quickstart --plot scores.png`
    """
    from launcher.report import evaluation as report
    from launcher.verbs import evaluating

    if plot is not None:
        if plot.suffix not in _PICTURES:
            raise UserError(f"--plot {plot} names no kind of picture that can be drawn; use {', '.join(_PICTURES)}")
        _check_can_be_written(plot, "--plot")
    found, left_out = evaluating.results_of(path)
    display = working()
    for reason in left_out:
        display.warn(reason)
    if plot is not None:
        report.plot_results(found, plot)
    if as_json:
        print(json.dumps([each.as_tree() for each in found], indent=2))
    else:
        display.show(report.comparison_table(found))


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
    else:
        out.write_text(f"{text}\n", encoding="utf-8")


def _check_can_be_written(path: Path, option: str) -> None:
    """Before the work, which would be lost otherwise.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it, or name another")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path} may not be written; name another")


def _split(names: Names) -> list[str]:
    """`--tasks a,b --tasks c` names three."""
    return [name for given in names or () for name in given.split(",") if name]
