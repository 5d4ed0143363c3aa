"""The text that every Python carries: documentation topics, docstrings and source of its standard library.

About 12 MB under the PSF licence, and no download. A text is in it once: docstrings are documents of their own (one
per module) and are cut out of the source, so that a docstring held out for evaluation is not trained on as code.
"""

import ast
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import xxhash

from data_pipeline.document import Document
from data_pipeline.sources.split import Split, hash_of
from data_pipeline.sources.storage import hash_local_file
from data_pipeline.sources.streams import OnBytes
from data_pipeline.tally import Tally
from trainer.section import UserError

PYTHON_STDLIB = "python-stdlib"

_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_BUILD_RECORDS = ("_sysconfigdata", "config-")  # what the build machine looked like, paths and all: not language
_FEW_FILES = 400  # a whole standard library has over 600

NamedDefinition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.Module | NamedDefinition


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def check_stdlib(root: Path) -> list[str]:
    """What a slim build of Python leaves out, one line for each part.

    Raises:
        UserError: nothing is there to read.
    """
    has_topics = (root / _TOPICS).is_file()
    num_files = len(_source_paths(root))
    if not has_topics and not num_files:
        raise UserError(
            f"data.sources: {PYTHON_STDLIB} needs the standard library's text and {root} holds none; "
            f"use another build of Python, or name your own text in data.sources"
        )
    notes = []
    if not has_topics:
        notes.append(f"{PYTHON_STDLIB}: this Python carries no documentation topics ({_TOPICS}); going on without")
    if num_files < _FEW_FILES:
        notes.append(f"{PYTHON_STDLIB}: this Python carries only {num_files} source files; going on with those")
    return notes


def plan_stdlib(root: Path, dataset: str, text_field: str) -> Split:
    """The one split of the library, named by the content of all its files."""
    names, paths = [], [root / _TOPICS, *_source_paths(root)]
    size_bytes = 0
    for path in paths:
        try:
            file_bytes = path.stat().st_size
            names += [path.relative_to(root).as_posix(), hash_local_file(str(path), file_bytes)]
            size_bytes += file_bytes
        except OSError:  # counted when it is read
            continue
    return Split(
        dataset=dataset,
        source=PYTHON_STDLIB,
        name=PYTHON_STDLIB,
        place=PYTHON_STDLIB,
        path=str(root),
        format="python_stdlib",
        start=0,
        end=1,
        size_bytes=size_bytes,
        file_bytes=None,
        text_field=text_field,
        fingerprint=hash_of(*names),
    )


def hash_stdlib(root: Path) -> str:
    """Hash of every file, for `content_hash`."""
    digest = xxhash.xxh3_128()
    for path in [root / _TOPICS, *_source_paths(root)]:
        if path.is_file():
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_stdlib_split(split: Split, max_document_bytes: int, tally: Tally, on_bytes: OnBytes) -> Iterator[Document]:
    yield from read_stdlib(stdlib_root(), tally)  # a worker's own, should it run on another machine


def read_stdlib(root: Path, tally: Tally) -> Iterator[Document]:
    """Topics, then for every module its docstrings and its source, in sorted order."""
    yield from _read_topics(root)
    for path in _source_paths(root):
        name = path.relative_to(root).as_posix()
        source_id = f"{PYTHON_STDLIB}/source/{name}"
        try:
            with tokenize.open(path) as handle:  # heeds the file's declared encoding
                text = handle.read()
        except OSError:
            tally.drop("unreadable", source_id)
            continue
        except (SyntaxError, UnicodeDecodeError):
            tally.drop("undecodable", source_id)
            continue
        docstrings, code = split_docstrings(text, _module_name(name))
        if docstrings:
            yield Document(f"{PYTHON_STDLIB}/docstrings/{name}", docstrings)
        yield Document(source_id, code)


def split_docstrings(text: str, module: str) -> tuple[str, str]:
    """Docstrings of a module, each under the dotted name it documents, and the module's code without them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old code are not our news
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # a template, or a deliberately broken file
        return "", text
    entries = []
    lines: list[str | None] = list(text.split("\n"))
    for name, node in _definitions(tree, module):
        docstring = ast.get_docstring(node)
        if docstring is not None and _cut_docstring(lines, node):
            entries.append(f"{name}\n\n{docstring}\n")
    return "\n\n".join(entries), "\n".join(line for line in lines if line is not None).lstrip("\n")


def _read_topics(root: Path) -> Iterator[Document]:
    path = root / _TOPICS
    if not path.is_file():
        return
    tree = ast.parse(path.read_bytes())
    topics = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    for name in sorted(topics):
        yield Document(f"{PYTHON_STDLIB}/topics/{name}", topics[name])


def _source_paths(root: Path) -> list[Path]:
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(_BUILD_RECORDS)
        ]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(_BUILD_RECORDS)]
    return sorted(path for path in paths if path != root / _TOPICS)


def _module_name(file_name: str) -> str:
    return file_name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, Definition]]:
    """The module and every class and function in it, with dotted names, in the order of the file."""
    if isinstance(node, Definition):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # expressions define nothing
            yield from _definitions(child, f"{name}.{child.name}" if isinstance(child, NamedDefinition) else name)


def _cut_docstring(lines: list[str | None], node: Definition) -> bool:
    """Blank out the lines of a docstring; False, and nothing is done, where it shares a line with code."""
    statement = node.body[0]
    first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
    before = (lines[first] or "").encode()[: statement.col_offset].decode()
    after = (lines[last] or "").encode()[statement.end_col_offset :].decode().strip()
    if before.strip() or (after and not after.startswith("#")):
        return False
    lines[first : last + 1] = [None] * (last + 1 - first)
    if len(node.body) == 1 and not isinstance(node, ast.Module):
        lines[first] = f"{before}..."  # a definition needs a body
    return True
