"""Who is woken finds a page, and the commands on it are such as there are."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from launcher.cli.main import app
from monitoring_tools import ROOT, RUNBOOKS, alerts
from trainer.config import RunConfig
from trainer.section import section_in

PAGES = sorted(path for path in RUNBOOKS.glob("*.md") if path.name != "README.md")
HEADINGS = ["What it means", "What to look at", "What to do", "When to ignore it"]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every `broadgauge ...`, in blocks and in sentences."""
    text = page.read_text()
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S) for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`(broadgauge [^`]+)`", text)]:
        if line.startswith("broadgauge "):
            yield shlex.split(line)[1:]


def mistake(words: list[str]) -> str | None:
    """What is wrong with a command: no such verb, no such option, too much or too little."""
    command: click.Command = typer.main.get_command(app)
    while inner := getattr(command, "commands", None):
        if not words or words[0] not in inner:
            return f"no verb {words[:1]}"
        command, words = inner[words[0]], words[1:]
    options = {name: each for each in command.params if each.param_type_name == "option" for name in each.opts}
    num_arguments = 0
    while words:
        word, words = words[0], words[1:]
        if not word.startswith("--"):
            num_arguments += 1
        elif word not in options:
            return f"{command.name} has no {word}"
        elif not getattr(options[word], "is_flag", False):
            words = words[1:]
    needed = sum(each.param_type_name == "argument" and each.required for each in command.params)
    return None if num_arguments == needed else f"{command.name} takes {needed} arguments"


def test_there_is_a_page_for_every_alert_and_an_alert_for_every_page() -> None:
    assert [page.stem for page in PAGES] == sorted(alerts())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_short_and_alike(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"^# (.*)$", text, flags=re.M)[0] == page.stem
    assert re.findall(r"^## (.*)$", text, flags=re.M) == HEADINGS
    assert 25 <= len(text.splitlines()) <= 50
    assert ["status", "RUN"] in list(commands(page))


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda page: page.stem)
def test_commands_are_such_as_there_are(page: Path) -> None:
    assert not {" ".join(words): mistake(words) for words in commands(page) if mistake(words)}


def test_the_check_of_commands_sees_mistakes() -> None:
    assert mistake(["checkpoint", "prune", "RUN", "--keep-last", "1", "--dry-run"]) is None
    assert mistake(["restart", "RUN"]) == "no verb ['restart']"
    assert mistake(["status", "RUN", "--now"]) == "status has no --now"
    assert mistake(["stop"]) == "stop takes 1 arguments"


def test_settings_are_such_as_there_are() -> None:
    sections = {
        name: inner[0] for name, field in RunConfig.model_fields.items() if (inner := section_in(field.annotation))
    }
    for page in RUNBOOKS.glob("*.md"):
        for name, key in re.findall(r"\b([a-z]+)\.([a-z_]+)\b", page.read_text()):
            assert name not in sections or key in sections[name].model_fields, f"{page.name}: {name}.{key}"


def test_the_index_names_every_alert_with_its_severity() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \|", (RUNBOOKS / "README.md").read_text(), flags=re.M)
    assert rows == [(name, name, rule["labels"]["severity"]) for name, rule in alerts().items()]


def test_links_lead_somewhere() -> None:
    for page in [*RUNBOOKS.glob("*.md"), ROOT / "k8s" / "monitoring" / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
