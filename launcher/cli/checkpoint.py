"""`broadgauge checkpoint`: what a run has saved, whether it is sound, and in what it differs."""

from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from launcher.cli.terminal import working
from launcher.report.display import Display
from trainer.config import UserError

app = typer.Typer(help="Look at checkpoints: list, verify, show, prune, diff.", no_args_is_help=True)

ONE = "A checkpoint; of a run, its newest."
_Json = Annotated[bool, typer.Option("--json", help="JSON, for machines.")]


@app.command("list")
def list_(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run, or its folder of checkpoints.", show_default=False)
    ],
    as_json: _Json = False,
) -> None:
    """The checkpoints of a run: what each holds, why it is kept, and what can be seen to be wrong with it.

    Files are looked at and not read: `broadgauge checkpoint verify` does that.

    Example: `broadgauge checkpoint list runs/quickstart`
    """
    from launcher.report import checkpoints as checkpoint_report
    from launcher.verbs import checkpoints

    survey = checkpoints.survey(path)
    if not as_json:
        checkpoint_report.show_survey(survey, _display())
        return
    _print_json(
        [
            {
                "path": entry.path,
                "step": entry.step,
                "is_newest": entry.step == survey.newest,
                "problem": entry.problem,
                "kept_for": entry.kept_for,
                **(checkpoints.facts(entry.manifest) if entry.manifest else {}),
                "layout": entry.manifest and entry.manifest.config.get("parallel"),
            }
            for entry in survey.entries
        ]
    )


@app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Checkpoints; of a run, all.", show_default=False)
    ],
    as_json: _Json = False,
) -> None:
    """Read every file against its hash, and see that together they hold every element once; exit code 1 if not.

    Example: `broadgauge checkpoint verify runs/quickstart/checkpoints/step-00000200`
    """
    from launcher.report import checkpoints as checkpoint_report
    from launcher.verbs import checkpoints

    display, verdicts = _display(), []
    with working(stderr=True).stage("verify") as bar:
        for verdict in checkpoints.verify(paths, bar.update):
            verdicts.append(verdict)
            if not as_json:
                display.line(checkpoint_report.line_of(verdict))
    if as_json:
        _print_json(verdicts)
    if any(verdict.problem for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help=ONE, show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape.")] = False,
    stats: Annotated[
        str | None, typer.Option(metavar="WEIGHT", help="Norm, mean and extremes of a weight and its moments.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """What a checkpoint holds: place in training, model, layout, data, tensors.

    Example: `broadgauge checkpoint show runs/quickstart --stats decoder.final_layernorm.weight`
    """
    from launcher.report import checkpoints as checkpoint_report
    from launcher.verbs import checkpoints
    from trainer.checkpoint.format.manifest import read_manifest

    checkpoint = checkpoints.find_one(path)
    manifest = read_manifest(checkpoint)
    shapes = checkpoints.tensor_shapes(checkpoint, manifest)
    found = _statistics(checkpoint, stats, list(shapes)) if stats else {}
    if as_json:
        more = {"statistics": found} if stats else {}
        facts = {"path": checkpoint, **checkpoints.facts(manifest), "config": manifest.config}
        _print_json(facts | {"tensors": shapes} | more)
        return
    display = _display()
    if not stats:
        checkpoint_report.show_manifest(checkpoint, manifest, shapes, display)
    if tensors:
        checkpoint_report.show_tensors(shapes, display)
    if stats:
        checkpoint_report.show_statistics(found, display)


def _statistics(checkpoint: Path, weight: str, names: list[str]) -> dict[str, Any]:
    """Raises:
    UserError: there is no such weight.
    """
    from trainer.checkpoint.format.comparison import statistics

    wanted = [name for name in names if weight in (name, name.partition("/")[2])]
    if not wanted:
        raise UserError(f"{checkpoint} has no weight {weight}; `broadgauge checkpoint show PATH --tensors` lists them")
    return {name: statistics(checkpoint, name) for name in wanted}


@app.command()
def prune(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.", show_default=False)],
    keep_last: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Instead of the run's checkpoint.keep_last.")
    ] = None,
    keep_every_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Instead of the run's checkpoint.keep_every_steps.")
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Instead of the run's checkpoint.keep_best.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and touch nothing.")] = False,
) -> None:
    """Remove the checkpoints that the run's own rules do not keep, and what killed writers have left.

    The newest checkpoint is verified first; without a sound one nothing is removed. One that is being read stays.

    Example: `broadgauge checkpoint prune runs/quickstart --keep-last 1 --dry-run`
    """
    from launcher.report import checkpoints as checkpoint_report
    from launcher.verbs import checkpoints

    options = {"keep_last": keep_last, "keep_every_steps": keep_every_steps, "keep_best": keep_best}
    changes = {name: value for name, value in options.items() if value is not None}
    pruned = checkpoints.prune(path, changes, dry_run=dry_run)
    checkpoint_report.show_pruned(pruned, _display(), dry_run=dry_run)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help=ONE, show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help=ONE, show_default=False)],
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Compare nothing but the weights.")] = False,
    as_json: _Json = False,
) -> None:
    """In what two checkpoints differ, tensor by tensor, whatever their layouts; exit code 1 if their states do.

    Example: `broadgauge checkpoint diff runs/a/checkpoints/step-00000200 runs/b/checkpoints/step-00000200`
    """
    from launcher.report import checkpoints as checkpoint_report
    from launcher.verbs import checkpoints

    found = checkpoints.diff(checkpoints.find_one(first), checkpoints.find_one(second), weights_only=weights_only)
    if as_json:
        _print_json({"is_equal": found.is_equal, **vars(found)})
    else:
        checkpoint_report.show_comparison(found, _display())
    if not found.is_equal:
        raise typer.Exit(1)


def _print_json(value: Any) -> None:
    print(orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2).decode())


def _display() -> Display:
    return Display(Console())
