"""The command line is an interface: a verb or an option that goes away or changes its name breaks somebody's script."""

import click
import pytest
import typer

from launcher.cli.main import app, first_of_all, spread_settings

SURFACE = {
    "run": ["CONFIG", "--run-dir", "--ray", "--force", "--set"],
    "prepare corpus": ["CONFIG", "--out", "--run-dir", "--workers", "--ray", "--set"],
    "prepare inspect": ["DIR", "--dataset", "--heldout", "--dropped", "--first", "--count"],
    "prepare train-classifier": ["--positive", "--negative", "--out", "--text-field", "--seed"],
    "train": ["CONFIG", "--run-dir", "--ray", "--force", "--set"],
    "plan": [
        "CONFIG",
        "--cluster",
        "--validate",
        "--verify",
        "--search",
        "--devices",
        "--top",
        "--plot",
        "--json",
        "--set",
    ],
    "doctor": ["CONFIG", "--run-dir", "--ray", "--json", "--set"],
    "status": ["RUN", "--watch", "--json"],
    "events": ["RUN", "--since", "--kind", "--json"],
    "logs": ["RUN", "--rank", "--tail", "--follow", "--error"],
    "report": ["RUN", "--out", "--compare"],
    "profile": ["RUN", "--steps", "--rank"],
    "stop": ["RUN", "--timeout"],
    "resume": ["RUN", "--ray", "--force"],
    "eval": [
        *("PATH", "--tasks", "--max-examples", "--contamination", "--harness", "--harness-folder"),
        *("--heldout", "--precision", "--out", "--save", "--data", "--set"),
    ],
    "results": ["RUN", "--plot", "--json"],
    "export": ["PATH", "--out", "--data", "--dtype", "--verify", "--set"],
    "import": ["SOURCE", "--out", "--revision"],
    "generate": [
        *("PATH", "--prompt", "--max-new-tokens", "--seed", "--greedy", "--temperature", "--top-k", "--top-p"),
        *("--repetition-penalty", "--no-repeat-ngram", "--beams", "--length-penalty", "--data", "--set"),
    ],
    "data ledger": ["RUN", "--step", "--tokens", "--json"],
    "checkpoint list": ["PATH", "--json"],
    "checkpoint verify": ["PATH...", "--json"],
    "checkpoint show": ["PATH", "--tensors", "--stats", "--json"],
    "checkpoint prune": ["RUN", "--keep-last", "--keep-every-steps", "--keep-best", "--dry-run"],
    "checkpoint diff": ["A", "B", "--weights-only", "--json"],
    "submit": [
        *("CONFIG", "--to", "--run-dir", "--follow", "--context", "--namespace", "--queue", "--image", "--overlay"),
        *("--python", "--dry-run", "--delete", "--force", "--set"),
    ],
    "config show": ["CONFIG", "--set"],
    "config schema": [],
}


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found |= commands(command, f"{prefix}{name} ") if inner else {f"{prefix}{name}": command}
    return found


COMMANDS = commands(typer.main.get_command(app))


def test_verbs_and_options_are_as_published() -> None:
    surface = {
        name: [p.metavar if p.param_type_name == "argument" else p.opts[0] for p in command.params if p.name != "help"]
        for name, command in COMMANDS.items()
    }
    assert surface == SURFACE


@pytest.mark.parametrize("name", SURFACE)
def test_every_verb_shows_an_example(name: str) -> None:
    assert f"broadgauge {name}" in (COMMANDS[name].help or "").partition("Example:")[2]


@pytest.mark.parametrize("name", SURFACE)
def test_no_word_of_the_help_is_lost(name: str) -> None:
    """Help is shown as markdown, in which `<name>` is an element of HTML that says nothing."""
    for parameter in COMMANDS[name].params:
        assert "<" not in (getattr(parameter, "help", None) or ""), parameter.name


def test_one_set_takes_several_values() -> None:
    assert spread_settings(["run", "c.yaml", "--set", "a=1", "b.c=2", "--run-dir", "x=y"]) == [
        *("run", "c.yaml", "--set", "a=1", "--set", "b.c=2"),
        *("--run-dir", "x=y"),
    ]
    assert spread_settings(["run", "--set", "a=1", "c.yaml"]) == ["run", "--set", "a=1", "c.yaml"]
    assert spread_settings(["run", "c.yaml", "--set=a=1"]) == ["run", "c.yaml", "--set=a=1"]


def test_what_holds_for_every_command_may_stand_anywhere() -> None:
    assert first_of_all(["run", "c.yaml", "--quiet", "--set", "a=1"]) == ["--quiet", "run", "c.yaml", "--set", "a=1"]
    assert first_of_all(["run", "c.yaml", "--progress", "json"]) == ["--progress", "json", "run", "c.yaml"]
    assert first_of_all(["--debug", "run", "--progress=plain"]) == ["--debug", "--progress=plain", "run"]
    assert first_of_all(["run", "--progress"]) == ["--progress", "run"]  # the parser refuses it
