import ast
import itertools
import shutil
import warnings
from pathlib import Path
from pydoc_data import topics

import pytest

from data_pipeline.sources.python_stdlib import (
    PYTHON_STDLIB,
    check_stdlib,
    plan_stdlib,
    read_stdlib,
    split_docstrings,
    stdlib_root,
)
from data_pipeline.tally import Tally
from read_sources import plan, read
from trainer.config import UserError

MODULE = '''\
# a comment
"""About the module.

More
    and indented.
"""

import os


class Shape:
    """A shape."""

    sides = 3

    def area(self):
        """How large."""  # checked
        return 0

    async def draw(self):
        """Draw."""


if os:
    def helper(): "on the line of its code"
'''


def test_docstrings_become_entries_and_leave_the_code() -> None:
    docstrings, code = split_docstrings(MODULE, "shapes")
    assert docstrings == (
        "shapes\n\nAbout the module.\n\nMore\n    and indented.\n\n\n"
        "shapes.Shape\n\nA shape.\n\n\n"
        "shapes.Shape.area\n\nHow large.\n\n\n"
        "shapes.Shape.draw\n\nDraw.\n"
    )
    assert code == (
        "# a comment\n\nimport os\n\n\nclass Shape:\n\n    sides = 3\n\n    def area(self):\n        return 0\n\n"
        "    async def draw(self):\n        ...\n\n\n"
        'if os:\n    def helper(): "on the line of its code"\n'
    )


def test_code_that_does_not_parse_is_kept_whole() -> None:
    assert split_docstrings("def broken(:\n", "m") == ("", "def broken(:\n")


def without_docstrings(tree: ast.Module) -> str:
    """The syntax tree as the cut should leave it: an independent statement of what `split_docstrings` may change."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                rest: list[ast.stmt] = [] if isinstance(node, ast.Module) else [ast.Expr(ast.Constant(...))]
                node.body = node.body[1:] or rest
    return ast.dump(tree)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["argparse", "asyncio/base_events", "difflib", "json/__init__", "textwrap"])
def test_the_code_of_real_modules_is_otherwise_unchanged(name: str) -> None:
    text = (stdlib_root() / f"{name}.py").read_text(encoding="utf-8")
    _, code = split_docstrings(text, name)
    assert without_docstrings(ast.parse(code)) == without_docstrings(ast.parse(text))
    assert not [
        node for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]  # fmt: skip


def test_the_whole_library_is_about_12_mb_in_a_fixed_order() -> None:
    with warnings.catch_warnings(record=True) as caught:
        documents, tally = read(PYTHON_STDLIB, PYTHON_STDLIB)
    assert not caught
    assert not tally.dropped
    assert plan(PYTHON_STDLIB).notes == ()
    assert 10_000_000 < sum(len(document.text.encode()) for document in documents) < 16_000_000

    ids = [document.id for document in documents]
    assert len(set(ids)) == len(ids)
    kinds = [list(group) for _, group in itertools.groupby(ids, key=lambda id: "/topics/" in id)]
    assert len(kinds) == 2, "topics come first"
    assert kinds[0] == [f"{PYTHON_STDLIB}/topics/{name}" for name in sorted(topics.topics)]
    sources = [id.removeprefix(f"{PYTHON_STDLIB}/source/") for id in ids if "/source/" in id]
    assert sources == [path.as_posix() for path in sorted(map(Path, sources))]
    assert {"ast.py", "asyncio/base_events.py", "this.py"} <= set(sources)
    for excluded in ("site-packages", "/test/", "/tests/", "idle_test", "_sysconfigdata", "pydoc_data/topics"):
        assert not [id for id in ids if excluded in id]


def test_a_docstring_is_in_one_document_only(tmp_path: Path) -> None:
    shutil.copy(stdlib_root() / "textwrap.py", tmp_path)
    sentence = "Remove any common leading whitespace from every line in `text`."
    documents = list(read_stdlib(tmp_path, Tally()))
    assert [sentence in document.text for document in documents] == [True, False]


def test_the_library_is_one_split_named_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "one/deep").mkdir(parents=True)
    (tmp_path / "one/a.py").write_text("x = 1", encoding="utf-8")
    (tmp_path / "one/deep/b.py").write_text("x = 2", encoding="utf-8")
    before = plan_stdlib(tmp_path / "one", "text", "text")
    assert before.size_bytes == 10
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert plan_stdlib(tmp_path / "two", "text", "text").id == before.id
    (tmp_path / "two/a.py").write_text("y = 1", encoding="utf-8")
    assert plan_stdlib(tmp_path / "two", "text", "text").id != before.id


def test_slim_builds_are_named_and_read(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text('"""Only this."""\nx = 1\n', encoding="utf-8")
    notes = check_stdlib(tmp_path)
    assert ["documentation topics" in note for note in notes] == [True, False]
    assert "only 1 source files" in notes[1]
    assert [document.text for document in read_stdlib(tmp_path, Tally())] == ["only\n\nOnly this.\n", "x = 1\n"]


def test_a_python_without_any_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none; use another build of Python"):
        check_stdlib(tmp_path)


def test_source_heeds_its_declared_encoding_and_undecodable_source_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "b.py").write_bytes(b"x = '\xe9'\n")
    tally = Tally()
    assert [document.text for document in read_stdlib(tmp_path, tally)] == ["# -*- coding: latin-1 -*-\nx = 'é'\n"]
    assert tally.dropped["undecodable"].places == [f"{PYTHON_STDLIB}/source/b.py"]
