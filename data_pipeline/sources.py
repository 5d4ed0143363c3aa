"""Where documents come from: the standard library, and files, folders and globs of .txt and .jsonl."""

import glob
import json
import os
import platform
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.document import Document
from data_pipeline.normalize import decode_utf8, is_text
from data_pipeline.python_stdlib import PYTHON_STDLIB, check_stdlib, read_stdlib, stdlib_root
from data_pipeline.tally import Tally
from trainer.config import UserError

SUFFIXES = (".txt", ".jsonl")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def check_sources(sources: Sequence[str]) -> list[str]:
    """Look at every source without reading it through; returns what the user should know, one line each.

    Raises:
        UserError: a source is missing, holds no text, or has a file that cannot be read.
    """
    notes = []
    for source in sources:
        notes += check_stdlib(stdlib_root()) if source == PYTHON_STDLIB else _check_path(source)
    return notes


def origin(source: str) -> str:
    """What a source means on this machine, for the record."""
    if source == PYTHON_STDLIB:
        return f"standard library of Python {platform.python_version()} (PSF licence)"
    return str(Path(source).expanduser().absolute())


def read_documents(sources: Sequence[str], text_field: str, tally: Tally) -> Iterator[Document]:
    """Every document of the sources, in an order that depends on their names and content alone.

    A file that two sources name is read once. What cannot be used is counted in `tally` and left out.
    """
    seen: set[Path] = set()
    for source in sources:
        if source == PYTHON_STDLIB:
            yield from read_stdlib(stdlib_root(), tally)
            continue
        for path in find_files(source)[0]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield from _read_file(path, source, text_field, tally)


def find_files(source: str) -> tuple[list[Path], int]:
    """The .txt and .jsonl files of a path source, sorted, and the number of other files beside them.

    Raises:
        UserError: the source is missing, or a file of another kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _walk(path)
    elif os.path.lexists(path):
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"data.sources: {source} is neither .txt nor .jsonl; convert it, or name a folder of such files"
            )
        found = [path]
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        if not matches:
            raise UserError(
                f"data.sources: {source} does not exist; "
                f"name a file, folder or glob of .txt and .jsonl, or {PYTHON_STDLIB}"
            )
        found = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
    usable = {file for file in found if file.suffix in SUFFIXES}
    return sorted(usable), len(set(found)) - len(usable)


def _walk(folder: Path) -> list[Path]:
    """Every file below a folder; links are followed, into each folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"data.sources: {error.filename} cannot be read ({error.strerror}); make it readable or remove it"
        )

    files, visited = [], set()
    for parent, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()  # of two ways to a folder the same one is taken in every run
        files += [Path(parent, name) for name in names]
    return files


def _check_path(source: str) -> list[str]:
    files, num_others = find_files(source)
    if not files:
        raise UserError(f"data.sources: {source} holds no .txt or .jsonl file; name a corpus of such files")
    if not sum(_readable_bytes(path) for path in files):
        raise UserError(
            f"data.sources: {source} is empty (0 bytes in {len(files)} files); name a corpus that holds text"
        )
    return [f"{source}: {num_others} files are neither .txt nor .jsonl and are left out"] if num_others else []


def _readable_bytes(path: Path) -> int:
    """Size of a file that can be read.

    Raises:
        UserError: it cannot.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"data.sources: {path} is not a regular file; remove it from the source")
        with open(path, "rb"):
            return status.st_size
    except OSError as error:
        raise UserError(
            f"data.sources: {path} cannot be read ({error.strerror}); make it readable or remove it"
        ) from error


def _read_file(path: Path, source: str, text_field: str, tally: Tally) -> Iterator[Document]:
    read = _read_jsonl if path.suffix == ".jsonl" else _read_txt
    try:
        yield from read(path, source, text_field, tally)
    except OSError:
        tally.drop("unreadable", str(path))


def _read_txt(path: Path, source: str, text_field: str, tally: Tally) -> Iterator[Document]:
    place = str(path)
    text, num_broken = decode_utf8(path.read_bytes())
    if not is_text(text, num_broken):
        tally.drop("undecodable", place)
        return
    if num_broken:
        tally.repair("broken_utf8", place, num_broken)
    yield Document(place, text, source)


def _read_jsonl(path: Path, source: str, text_field: str, tally: Tally) -> Iterator[Document]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            stripped = line.removeprefix(_BYTE_ORDER_MARK).strip()
            if not stripped:
                continue
            place = f"{path}:{number}"
            record = _parse_json(stripped, place, tally)
            if not isinstance(record, dict):
                tally.drop("bad_json", place)
            elif text_field not in record:
                tally.drop("missing_field", place)
            elif not isinstance(record[text_field], str):
                tally.drop("field_not_text", place)
            else:
                yield Document(place, record[text_field], source)


def _parse_json(line: bytes, place: str, tally: Tally) -> Any:
    """The value of a line, or None.

    orjson refuses broken UTF-8 and escaped lone surrogates, which the standard library's parser lets through to be
    repaired.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    text, num_broken = decode_utf8(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if num_broken:
        tally.repair("broken_utf8", place, num_broken)
    return record
