"""`broadgauge status|logs|stop|resume RUN`."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.cli.options import RayOption
from launcher.report.display import Display

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
_FOLLOW_SECONDS = 0.2


def status(
    path: _Run,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for machines.")] = False,
) -> None:
    """How a run is: at work or how it ended, its step and loss, what failed and what is saved.

    Example: `broadgauge status runs/quickstart`
    """
    from launcher.verbs import runs

    found = runs.status(path)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    display = Display(Console())
    display.line(f"{path}: {found.state}" + (f" ({found.detail})" if found.detail else ""))
    loss = f", loss {found.loss:.4f}" if found.loss is not None else ""
    pace = f", {found.step_seconds:.3g} s a step" if found.step_seconds is not None else ""
    display.line(f"  step {found.step:,} of {found.num_steps:,}{loss}{pace}")
    saved = f"step {found.saved_step:,}" if found.saved_step is not None else "none"
    display.line(f"  newest checkpoint: {saved}; ranks were started {found.lives} times, {found.failures} failures")
    if found.last_failure:
        display.line(f"  last failure: {found.last_failure}")


def logs(
    path: _Run,
    rank: Annotated[list[int] | None, typer.Option(metavar="N", help="Of these ranks; of all if not given.")] = None,
    tail: Annotated[int, typer.Option(min=0, metavar="LINES", help="Of each rank's end.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    error: Annotated[bool, typer.Option("--error", help="Only what the first rank to fail wrote.")] = False,
) -> None:
    """What ranks have written, line by line with their numbers.

    Example: `broadgauge logs runs/quickstart --rank 2 --follow`
    """
    from launcher.verbs import runs

    run_dir = runs.open_run(path)
    if error:
        print("\n".join(runs.first_error(run_dir)) or "no failure is recorded")
        return
    with runs.following(run_dir, rank or (), tail) as follower:
        for line in follower.last():
            print(line)
        while follow:
            for line in follower.new():
                print(line, flush=True)
            time.sleep(_FOLLOW_SECONDS)


def stop(
    path: _Run,
    timeout_seconds: Annotated[
        float | None, typer.Option("--timeout", min=0.0, metavar="SECONDS", help="To wait for its end; for ever.")
    ] = None,
) -> None:
    """Have a run of this machine save and end, as preempted; `broadgauge resume` goes on with it.

    Example: `broadgauge stop runs/quickstart`
    """
    from launcher.verbs import runs

    print(f"{path}: {runs.stop(path, timeout_seconds)}")


def resume(path: _Run, ray: RayOption = None) -> None:
    """Go on with a run, by its own config: as the command that began it would.

    Example: `broadgauge resume runs/quickstart`
    """
    from launcher.verbs import runs

    runs.resume(path, Display(Console()), ray)
