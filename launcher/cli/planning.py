"""`broadgauge plan CONFIG`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.options import SetOption
from launcher.cli.terminal import working
from trainer import config_file
from trainer.config import RunConfig, UserError

if TYPE_CHECKING:
    from launcher.planning.cluster import Cluster

_MOST_DEVICES = 10_000_000  # a search tries every divisor of theirs


def plan(
    path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False)
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="a100-80, h100, h200, b200, cpu, or a YAML file; launch.cluster if not given."
        ),
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Compare predictions with published measurements instead.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Build every rank of the layout without memory, and compare its bytes with the plan's."
        ),
    ] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Look through all layouts for the fastest that fit instead.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_DEVICES,
            help="With --search: how many devices there are; those of the config's layout if not given.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="With --search: how many layouts to show.")] = 10,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw a step's time and memory, stage by stage: .png, .svg or .pdf.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for machines.")] = False,
    settings: SetOption = None,
) -> None:
    """Whether a run fits a cluster, how long it will take and what it will cost, before a device is touched.

    Exit code 1 if it does not fit, or with --search if nothing does, or with --verify if a byte differs.

    Example: `broadgauge plan configs/quickstart.yaml --cluster h100 --set preset=gpt3_13b parallel.data=8`
    """
    from launcher.planning import cluster as clusters
    from launcher.planning import planner
    from launcher.report import plan_picture
    from launcher.report import planning as report

    if plot is not None:
        if validate or search:
            raise UserError("--plot draws the plan of the config's own layout; leave out --validate and --search")
        plan_picture.check_path(plot)
    if validate:
        _validate(as_json)
        return
    if path is None:
        raise UserError("a plan is of a config, and none is given; name one, or use --validate")
    config = config_file.load(path, settings or ())
    if verify:
        if search or plot is not None:
            raise UserError("--verify is of the config's own layout, and draws nothing; leave out --search and --plot")
        _verify(config, as_json)
        return
    where = clusters.load(clusters.named_by(config) if cluster is None else cluster)
    if search:
        _search(config, where, devices, top, as_json)
        return
    if devices is not None:
        raise UserError("--devices is for --search, and a plan is of the config's own layout; add --search")
    found = planner.make_plan(config, where)
    if plot is not None:
        plan_picture.draw(found, plot)
    if as_json:
        print(json.dumps(found.as_tree(), indent=2, allow_nan=False))
    else:
        working().show(report.screen(found))
    if not found.fits:
        raise typer.Exit(1)


def _search(config: RunConfig, cluster: "Cluster", devices: int | None, top: int, as_json: bool) -> None:
    from launcher.planning.search import search
    from launcher.report import layouts_found

    found = search(config, cluster, devices, top)
    if as_json:
        print(json.dumps(found.as_tree(), indent=2, allow_nan=False))
    else:
        working().show(layouts_found.screen(found))
    if not found.best:
        raise typer.Exit(1)


def _verify(config: RunConfig, as_json: bool) -> None:
    from launcher.report import verification
    from launcher.verbs import verifying

    display = working(stderr=as_json)
    with display.stage("verify") as bar:
        found = verifying.verify(config, update=bar.update)
    if as_json:
        print(json.dumps(found.as_tree(), indent=2))
    else:
        display.show(verification.screen(found))
    if found.differences:
        raise typer.Exit(1)


def _validate(as_json: bool) -> None:
    from launcher.planning import validate
    from launcher.report import planning as report

    comparisons = validate.compare()
    if as_json:
        print(json.dumps([each.as_tree() for each in comparisons], indent=2, allow_nan=False))
    else:
        working().show(report.validation(comparisons))
