"""`broadgauge data`: what a run did with its data."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.cli.terminal import working
from launcher.report.display import Display
from trainer.run_dir import RunDir

app = typer.Typer(help="Look at what a run did with its data.", no_args_is_help=True)


@app.command()
def ledger(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.", show_default=False)],
    step: Annotated[int | None, typer.Option(min=1, metavar="N", help="List the samples of this step instead.")] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens/--no-tokens", help="Read every sample again, and compare with what was fed.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that a run used each sample once an epoch, through crashes and rollbacks; exit code 1 if it did not.

    Example: `broadgauge data ledger runs/quickstart`
    """
    from launcher.report import ledger as ledger_report
    from trainer.data.ledger import audit

    run_dir = RunDir(path)
    if step is not None:
        used = ledger_report.step_samples(*audit.samples_of(run_dir, step))
        if as_json:
            print(json.dumps(used))
        else:
            ledger_report.show_step(used, Display(Console()))
        return
    display = working(stderr=as_json)
    with display.stage("ledger") as bar:
        found = audit.audit(run_dir, check_tokens=tokens, progress=bar.update)
        bar.result = ledger_report.verdict(found)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        ledger_report.show(found, display)
    if found.findings:
        raise typer.Exit(1)
