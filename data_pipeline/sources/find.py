"""The files that an entry of the config names: a file, a folder, a glob, or any of these behind a URL."""

import glob
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources.split import KINDS, format_of, printable
from data_pipeline.sources.storage import Remote, hash_local_file, is_url, one_line
from trainer.section import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    name: str
    """Relative to the source, with `/`."""
    place: str
    path: str
    identity: str
    """The same for every way to the same file on this machine."""
    size_bytes: int | None
    fingerprint: str
    modified_ns: int | None = None
    seekable: bool = True
    problem: str = ""
    """Why it cannot be read, if it cannot."""


def find_files(source: str, where: str) -> tuple[list[FoundFile], int]:
    """The files of a source that can hold text, sorted by name, and the number of other files beside them.

    Raises:
        UserError: the source is missing, is a file of another kind, or cannot be listed. `where` says in which setting.
    """
    if source.startswith(("file://", "local://")):
        source = source.partition("://")[2]
    files, num_others = _find_remote(source, where) if is_url(source) else _find_local(source, where)
    if not files:
        raise UserError(f"{where}: {source} holds no file that ends in {KINDS}; name a corpus of such files")
    return sorted(files, key=lambda file: file.name.split("/")), num_others


def _find_local(source: str, where: str) -> tuple[list[FoundFile], int]:
    path = Path(source).expanduser()
    if path.is_dir():
        root, found = path, _walk(path, where)
    elif os.path.lexists(path):
        _check_kind(source, path.name, where)
        root, found = path.parent, [path]
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        if not matches:
            raise UserError(f"{where}: {source} does not exist; name a file, folder, glob or URL, or python-stdlib")
        root = _fixed_folder(path)
        found = [file for match in matches for file in (_walk(match, where) if match.is_dir() else [match])]
    distinct = set(found)
    usable = {file for file in distinct if format_of(file.name)}
    return [_local_file(file, root) for file in usable], len(distinct) - len(usable)


def _fixed_folder(pattern: Path) -> Path:
    """The folder above the first part of a path that is a pattern."""
    num_fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    return Path(*pattern.parts[:num_fixed])


def _walk(folder: Path, where: str) -> list[Path]:
    """Every file below a folder; links are followed, into each folder once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{where}: {error.filename} cannot be read ({error.strerror}); make it readable or remove it")

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


def _local_file(path: Path, root: Path) -> FoundFile:
    name = path.relative_to(root).as_posix()
    place, absolute = printable(str(path)), os.path.abspath(path)
    identity = os.path.realpath(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise OSError("it is not a regular file")
        fingerprint = hash_local_file(absolute, status.st_size)
    except OSError as error:
        problem = one_line(error)
        return FoundFile(
            name=name, place=place, path=absolute, identity=identity, size_bytes=0, fingerprint="", problem=problem
        )
    return FoundFile(
        name=name,
        place=place,
        path=absolute,
        identity=identity,
        size_bytes=status.st_size,
        fingerprint=fingerprint,
        modified_ns=status.st_mtime_ns,
    )


def _find_remote(source: str, where: str) -> tuple[list[FoundFile], int]:
    remote = Remote(source, where)
    listed = remote.list()
    if not listed:
        raise UserError(f"{where}: {source} does not exist; check the URL")
    if list(listed) == [remote.path]:
        _check_kind(source, remote.url_of(remote.path), where)
    usable = {path: info for path, info in listed.items() if format_of(remote.url_of(path))}
    root = _fixed_prefix(remote, usable)
    return [_remote_file(remote, path, info, root) for path, info in usable.items()], len(listed) - len(usable)


def _fixed_prefix(remote: Remote, paths: Iterable[str]) -> str:
    """What names are relative to: the pattern's folder, the folder, or the folder of the only file."""
    if remote.has_glob:
        fixed = remote.path[: min(remote.path.find(char) for char in "*[?" if char in remote.path)]
        return fixed[: fixed.rfind("/") + 1]
    if remote.path in paths:
        return remote.path[: remote.path.rfind("/") + 1]
    return remote.path.rstrip("/") + "/"


def _remote_file(remote: Remote, path: str, info: dict[str, Any], root: str) -> FoundFile:
    url = remote.url_of(path)
    try:
        fingerprint, problem = remote.hash_file(path, info), ""
    except Exception as error:  # drivers raise whatever their own library does
        fingerprint, problem = "", one_line(error)
    return FoundFile(
        name=path.removeprefix(root),
        place=url,
        path=url,
        identity=url,
        size_bytes=info.get("size"),
        fingerprint=fingerprint,
        seekable=remote.is_seekable(info),
        problem=problem,
    )


def _check_kind(source: str, name: str, where: str) -> None:
    if format_of(name) is None:
        raise UserError(f"{where}: {source} ends neither in {KINDS}; convert it, or name a folder of such files")
