"""What users rely on is written down, and what is written down is true."""

import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer import config_file
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


@pytest.mark.parametrize("page", ["configuration", "layouts"])
def test_generated_page_is_up_to_date(page: str) -> None:
    spec = importlib.util.spec_from_file_location(page, ROOT / "docs" / f"{page}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.render(), "run `make docs`"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config_file.load(path)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"`make ([a-z-]+)`", page.read_text()))
        assert named <= targets, f"{page.name} names {named - targets}"
