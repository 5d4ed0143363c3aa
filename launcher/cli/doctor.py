"""`broadgauge doctor [CONFIG]`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from launcher.cli.options import RayOption, RunDirOption, SetOption, run_dir_of
from launcher.report.display import Display
from trainer import config_file
from trainer.config import UserError


def doctor(
    path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The run's YAML file: what is to be enough.")
    ] = None,
    run_dir: RunDirOption = None,
    ray: RayOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for machines.")] = False,
    settings: SetOption = None,
) -> None:
    """Examine this machine, or all of a Ray cluster, before a run: a line for each check; exit code 1 if one fails.

    Example: `broadgauge doctor configs/quickstart.yaml --ray auto`
    """
    from launcher.doctor.examination import examination
    from launcher.doctor.finding import worst
    from launcher.doctor.machine import Subject
    from launcher.report import doctor as doctor_report

    if path is None and settings:
        raise UserError("--set changes values of a config, and none is given; name one")
    config = config_file.load(path, settings or ()) if path else None
    where = run_dir_of(config, run_dir).path if config else run_dir or Path("runs")
    display, findings = Display(Console()), []
    for finding in examination(Subject(config, where.absolute()), ray):
        findings.append(finding)
        if not as_json:
            doctor_report.show(finding, display)
    if as_json:
        told = {"verdict": worst(findings), "findings": [asdict(finding) for finding in findings]}
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2, default=str).decode())
    else:
        doctor_report.show_summary(findings, display)
    if worst(findings) == "fail":
        raise typer.Exit(1)
