"""`broadgauge status|logs|stop|resume RUN`."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.cli.options import ForceOption, RayOption
from launcher.cli.terminal import working
from launcher.report.display import Display

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
_FOLLOW_SECONDS = 0.2


def status(
    path: _Run,
    watch: Annotated[bool, typer.Option("--watch", help="Live, until the command that works on it has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for machines.")] = False,
) -> None:
    """How a run is: at work or how it ended, its step, loss, speed and goodput, what failed and what is saved.

    Example: `broadgauge status runs/quickstart --watch`
    """
    from launcher.report import status as report
    from launcher.verbs import runs

    run, display = runs.Observer(path), Display(Console())
    if watch:
        report.watch(run.status, str(path), display)
    elif not as_json:
        report.show(run.status(), display)
    if as_json:
        print(json.dumps(asdict(run.status()), indent=2))


def events(
    path: _Run,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="From then on: `2h`, `30min` ago, `14:05`, or an ISO 8601 time.")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(metavar="KIND", help="Of these kinds; of all if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As they are in the record, an object a line.")] = False,
) -> None:
    """What has happened to a run: its record, a line for each event.

    Example: `broadgauge events runs/quickstart --since 2h --kind life_failed`
    """
    from launcher.report import events as report
    from launcher.verbs import runs

    display, begin = Display(Console()), report.moment(since) if since is not None else None
    for event in runs.events(path, begin, kind or ()):
        if as_json:
            print(json.dumps(event))
        else:
            display.line(report.line_of(event))


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


def report(
    path: _Run,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; RUN/report.html if not given.")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Another run, to be drawn beside it; may be given again.")
    ] = None,
) -> None:
    """The page of a run as one file of HTML that needs no server: curves, restarts, checkpoints, logs.

    Example: `broadgauge report runs/quickstart --compare runs/fp32`
    """
    from launcher.verbs import reporting

    print(reporting.write(path, out, compare or ()))


def profile(
    path: _Run,
    steps: Annotated[str, typer.Option(metavar="FIRST:LAST", help="Steps to come.", show_default=False)],
    rank: Annotated[list[int] | None, typer.Option(metavar="N", help="Of these ranks; of rank 0 if not given.")] = None,
) -> None:
    """Record what ranks do in some steps, without stopping them: a trace for Perfetto or chrome://tracing each.

    Example: `broadgauge profile runs/quickstart --steps 100:102 --rank 0 --rank 3`
    """
    from launcher.verbs import profiling

    with working(stderr=True).stage("profile"):
        traces = profiling.profile(path, steps, rank or (0,))
    print("\n".join(map(str, traces)))


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


def resume(path: _Run, ray: RayOption = None, force: ForceOption = False) -> None:
    """Go on with a run, by its own config: as the command that began it would.

    Example: `broadgauge resume runs/quickstart`
    """
    from launcher.verbs import runs

    runs.resume(path, working(), ray, force=force)
