"""The command line. Exit codes: 0 done, 1 failed, 2 something the user can mend, 75 preempted, 130 interrupted."""

import json
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from launcher.cli import checkpoint as checkpoint_cli
from launcher.cli import data as data_cli
from launcher.cli import doctor as doctor_cli
from launcher.cli import evaluation as evaluation_cli
from launcher.cli import planning as planning_cli
from launcher.cli import prepare as prepare_cli
from launcher.cli import runs, terminal
from launcher.cli import submit as submit_cli
from launcher.cli.options import ConfigFile, DataOption, ForceOption, RayOption, RunDirOption, SetOption, run_dir_of
from launcher.cli.terminal import working
from launcher.report.display import Mode
from trainer import config_file
from trainer.config import UserError
from trainer.stop import Interrupted, Preempted

_INTERRUPTED = 130
_PREEMPTED = 75  # EX_TEMPFAIL of <sysexits.h>: try again

app = typer.Typer(
    name="broadgauge",
    help="Train GPT-scale language models: raw text to a trained, evaluated, exported model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(prepare_cli.app, name="prepare")
app.add_typer(data_cli.app, name="data")
app.add_typer(checkpoint_cli.app, name="checkpoint")
app.add_typer(config_app, name="config")
app.command("eval")(evaluation_cli.evaluate)
app.command()(evaluation_cli.results)
for verb in (
    *(planning_cli.plan, doctor_cli.doctor, submit_cli.submit),
    *(runs.status, runs.events, runs.logs, runs.report, runs.profile, runs.stop, runs.resume),
):
    app.command()(verb)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    progress: Annotated[
        Mode,
        typer.Option(help="Of long work: a bar on terminals, plain lines, an object of JSON a line, or nothing."),
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Say only what may be wrong.")] = False,
) -> None:
    """These may stand before or after the command's name. `main` reads `--debug`."""
    terminal.use("quiet" if quiet else progress)


@app.command()
def run(
    path: ConfigFile,
    run_dir: RunDirOption = None,
    ray: RayOption = None,
    force: ForceOption = False,
    settings: SetOption = None,
) -> None:
    """Do a whole run: prepare, train, evaluate, export, generate. Run it again to go on after an interruption.

    Example: `broadgauge run configs/quickstart.yaml --run-dir runs/fp32 --set train.precision=fp32 seed=7`
    """
    from launcher.verbs import stages

    config = config_file.load(path, settings or ())
    stages.run(config, run_dir_of(config, run_dir), working(), ray, force=force)


@app.command()
def train(
    path: ConfigFile,
    run_dir: RunDirOption = None,
    ray: RayOption = None,
    force: ForceOption = False,
    settings: SetOption = None,
) -> None:
    """Train on prepared data, from the newest checkpoint if there is one.

    Example: `broadgauge train configs/quickstart.yaml --set data.prepared=data/stdlib`
    """
    from launcher.verbs import stages

    config = config_file.load(path, settings or ())
    stages.train_alone(config, run_dir_of(config, run_dir), working(), ray, force=force)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or one of its checkpoints.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Hugging Face folder to write.", show_default=False)],
    data: DataOption = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights.")] = "fp32",
    verify: Annotated[
        Literal["auto", "full", "sample", "none"],
        typer.Option(help="Compare all of it with the trained model, or tensors and layers drawn; auto: as it fits."),
    ] = "auto",
    settings: SetOption = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder and check it against the trained model.

    Example: `broadgauge export runs/quickstart/checkpoints/step-00000200 --out exports/step-200 --dtype bf16`
    """
    from launcher.verbs import inspection

    with working(stderr=True).stage("export") as bar:
        verified = inspection.export(path, out, data, settings or (), dtype, verify, bar.update)
    print(f"{out}: {verified.summary}")


@app.command("import")
def import_model(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A Hugging Face folder, or a name on the hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the hub; its main branch if not given.")
    ] = None,
) -> None:
    """Make a model of Hugging Face a checkpoint to train on from, with its config and tokenizer.

    Example: `broadgauge import openai-community/gpt2 --out imports/gpt2`
    """
    from launcher.verbs import importing

    with working(stderr=True).stage("import") as bar:
        imported = importing.import_model(source, out, revision, bar.update)
    print(f"{imported.checkpoint}: a {imported.architecture}; train on from it with {imported.config_path}")
    if imported.tokenizer_problem:
        print(f"no data can be prepared with its tokenizer: {imported.tokenizer_problem}")


@app.command()
def generate(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run, a checkpoint, or a Hugging Face folder.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token each time; draw none.")] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Logits are divided by it before a token is drawn.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among so many of the likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw among the fewest that have this probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, help="Makes tokens that have come before less likely, above 1.")
    ] = None,
    no_repeat_ngram: Annotated[
        int | None, typer.Option(min=0, help="No so many tokens in a row twice, prompt included.")
    ] = None,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Continuations followed at once, of which the best is taken.")
    ] = None,
    length_penalty: Annotated[float | None, typer.Option(help="The higher, the longer the beam that is taken.")] = None,
    data: DataOption = None,
    settings: SetOption = None,
) -> None:
    """Continue a prompt: with the newest checkpoint of a run, on ranks in its own layout, or with an exported model.

    Example: `broadgauge generate runs/quickstart --prompt "The list is" --top-p 0.9 --max-new-tokens 32`
    """
    from launcher.verbs import generating
    from trainer.inference.requests import Decoding

    if greedy and temperature:
        raise UserError(f"--greedy and --temperature {temperature:g} contradict each other; leave one of them out")
    if beams is not None and beams > 1 and temperature:
        raise UserError(
            f"--beams {beams} draws nothing, so --temperature {temperature:g} has no use; leave one of them out"
        )
    given = {
        "temperature": 0.0 if greedy else temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram": no_repeat_ngram,
        "beams": beams,
        "length_penalty": length_penalty,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        if not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value} is no number to reckon with; give a finite one")
    decoding = Decoding(**{"temperature": 1.0} | changes) if changes else None

    def say(piece: str) -> None:
        print(piece, end="", flush=True)

    generating.generate(path, prompt, max_new_tokens, seed, decoding, say, data, settings or ())
    print()


@config_app.command("show")
def show_config(path: ConfigFile, settings: SetOption = None) -> None:
    """The resolved config: preset and overrides filled in, every value written out.

    Example: `broadgauge config show configs/quickstart.yaml --set train.precision=fp32`
    """
    print(config_file.dump(config_file.load(path, settings or ())), end="")


@config_app.command("schema")
def show_schema() -> None:
    """The JSON schema of a config: every key with its type, unit and meaning.

    Example: `broadgauge config schema`
    """
    print(json.dumps(config_file.json_schema(), indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = first_of_all(spread_settings(arguments))
    try:
        app(arguments)
    except SystemExit as end:  # how the parser ends, also on Ctrl-C
        if end.code == _INTERRUPTED:
            print("interrupted; run the same command again to go on", file=sys.stderr)
        raise
    except Preempted as error:
        is_interrupted = isinstance(error, Interrupted)
        print(f"{'interrupted' if is_interrupted else 'preempted'}: {error}", file=sys.stderr)
        sys.exit(_INTERRUPTED if is_interrupted else _PREEMPTED)
    except UserError as error:
        _complain(f"error: {error}", debug)
        sys.exit(2)
    except Exception as error:
        _complain(f"failed: {type(error).__name__}: {' '.join(str(error).split())}", debug)
        sys.exit(1)


def _complain(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def first_of_all(arguments: Sequence[str]) -> list[str]:
    """With the options that every command has in front, where the parser takes them."""
    common: list[str] = []
    others: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument in ("--debug", "--quiet") or argument.startswith("--progress="):
            common.append(argument)
        elif argument == "--progress":
            common += [argument, *([value] if (value := next(waiting, None)) is not None else [])]
        else:
            others.append(argument)
    return [*common, *others]


def spread_settings(arguments: Sequence[str]) -> list[str]:
    """`--set a=1 b=2` -> `--set a=1 --set b=2`: the parser takes one value an option."""
    spread: list[str] = []
    in_settings = False
    for argument in arguments:
        if argument.startswith("-"):
            in_settings = argument == "--set"
            if not in_settings:
                spread.append(argument)
        elif in_settings and "=" in argument:
            spread += ["--set", argument]
        else:
            in_settings = False
            spread.append(argument)
    return spread
