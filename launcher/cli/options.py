"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.config import RunConfig
from trainer.run_dir import RunDir

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False)]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Folder of the run; runs/NAME if not given.")
]
DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Prepared data; the run's own if not given.")
]
RayOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Work on a Ray cluster instead; `auto` finds the local one.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Go on though the memory there is will not be enough.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c ...", help="Override config values; takes several at once."),
]


def run_dir_of(config: RunConfig, path: Path | None) -> RunDir:
    return RunDir(path or Path("runs") / config.name)
