"""What users rely on is written down, and what is written down is true."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer import config_file, events
from trainer.config import RunConfig
from trainer.section import section_in

ROOT = Path(__file__).parents[2]


def sections(section: type[BaseModel] = RunConfig) -> list[type[BaseModel]]:
    found = [section]
    for field in section.model_fields.values():
        if inner := section_in(field.annotation):
            found += sections(inner[0])
    return found


def test_every_setting_is_documented() -> None:
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not undocumented


@pytest.mark.parametrize("page", ["configuration", "costs", "events", "layouts", "metrics"])
def test_generated_page_is_up_to_date(page: str) -> None:
    spec = importlib.util.spec_from_file_location(page, ROOT / "docs" / f"{page}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.render(), "run `make docs`"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config_file.load(path)


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_has_its_cells(page: Path) -> None:
    num_cells = 0
    for line in page.read_text().splitlines():
        if not line.startswith("|"):
            assert not (num_cells and line.strip()), f"{line!r} cuts a table off"
            num_cells = 0
            continue
        found = len(re.findall(r"(?<!\\)\|", line)) - 1
        num_cells = num_cells or found
        assert found == num_cells and line.endswith("|"), f"{line!r} has not the cells of its table"


def test_types_of_settings_are_said_in_words() -> None:
    types = re.findall(
        r"^\| `[a-z_.NAME]+` \| ([^|]*) \|", (ROOT / "docs" / "configuration.md").read_text(), flags=re.M
    )
    assert "mapping of names to sections below" in types and "section below, empty" in types
    assert "mapping of names to numbers" in types and "number, `auto`, empty" in types
    assert not [each for each in types if "belows" in each]


def documented_events() -> dict[str, str]:
    """Kind of event -> what `trainer.events` says of it."""
    assert events.__doc__ is not None
    table = events.__doc__.partition("the rest depends on the kind:\n")[2]
    rows = re.findall(r"^    (\w+) +(.*(?:\n {8,}.*)*)", table, flags=re.M)
    return dict(rows)


def recorded_events() -> dict[str, set[str]]:
    """Kind of event -> the fields with which the code writes it: `record("kind", field=...)` by any name for record."""
    found: dict[str, set[str]] = {}
    for path in [
        each for package in ("trainer", "launcher", "data_pipeline") for each in (ROOT / package).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in WRITERS:
                kind = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
                if isinstance(kind, str) and node.keywords:
                    fields = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                    found[kind] = found.get(kind, set()) | fields
    return found


WRITERS = ("record", "_record", "write")


def test_every_kind_of_event_is_documented_with_its_fields() -> None:
    documented, recorded = documented_events(), recorded_events()
    assert documented.keys() == recorded.keys()
    for kind, fields in recorded.items():
        assert not fields - set(re.findall(r"\w+", documented[kind])), kind


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"`make ([a-z-]+)`", page.read_text()))
        assert named <= targets, f"{page.name} names {named - targets}"
