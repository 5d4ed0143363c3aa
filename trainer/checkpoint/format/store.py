"""Checkpoints as folders: how one comes to exist, how it is found, checked and removed.

A checkpoint is a folder `step-<n>` whose manifest.json lists every other file with its size and xxh3-128 hash. It is
written under a temporary name, made durable, and renamed: a folder with a valid manifest is whole, anything else is
not a checkpoint.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.checkpoint.format.chunk_file import incomplete, read_layout
from trainer.checkpoint.format.manifest import (
    ABSENT,
    MANIFEST,
    Manifest,
    Unreadable,
    fingerprint,
    read_manifest,
    sync_folder,
    write_manifest,
)
from trainer.config import UserError
from trainer.progress import Advance, unheard

_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")  # of each step exactly the name that `folder_name` gives it
_log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """A checkpoint was not written, for this reason; those before it are as they were."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder name stands for; None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def temporary_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it exists."""
    return checkpoints / f"{folder_name(step)}.tmp"


def begin(checkpoints: Path, step: int) -> Path:
    """An empty temporary folder to write the checkpoint of `step` into; leftovers of a crash are removed."""
    temporary = temporary_folder(checkpoints, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest and give the folder its name. From here on the checkpoint exists.

    The files must be durable already; those that the manifest does not list are removed, after it is there: at every
    moment the folder says what it is to be.
    """
    write_manifest(temporary, manifest)
    for path in temporary.iterdir():
        if path.name not in (MANIFEST, *manifest.files):
            path.unlink()
    final = temporary.with_suffix("")
    if final.exists():  # an earlier life of this run got here too; its copy was found invalid, or we would not be here
        _remove(final)
    os.rename(temporary, final)
    sync_folder(final.parent)
    return final


def commit_whole(temporary: Path, manifest: Manifest) -> Path:
    """Commit a folder whose files together hold every element of the state.

    Raises:
        SaveFailed: they do not.
    """
    lacking = incomplete([read_layout(temporary / name) for name in manifest.files])
    if lacking:
        raise SaveFailed(f"its files are not the whole state: {lacking}")
    return commit(temporary, manifest)


def steps(checkpoints: Path) -> list[int]:
    """Steps of the folders that look like checkpoints, oldest first."""
    found = (step_of(item.name) for item in checkpoints.iterdir()) if checkpoints.is_dir() else ()
    return sorted(step for step in found if step is not None)


def read(checkpoint: Path, *, part: bool = False) -> Manifest:
    """The manifest of a checkpoint or snapshot, without looking at its files.

    Args:
        part: whether it may be one machine's part of it.

    Raises:
        UserError: there is none, or it cannot be that of this folder.
    """
    manifest, match = read_manifest(checkpoint), _NAME.fullmatch(checkpoint.resolve().name)
    if not manifest.files:
        raise UserError(f"{checkpoint} is damaged: its manifest lists no files")
    if not part and not manifest.is_whole:
        raise UserError(f"{checkpoint} is not whole: it has {len(manifest.files)} of {manifest.num_files} files")
    if match and int(match[1]) != manifest.step:
        raise UserError(f"{checkpoint} is damaged: its manifest is that of step {manifest.step}")
    return manifest


def verify(checkpoint: Path, only: Iterable[str] | None = None, advance: Advance = unheard) -> Manifest:
    """Check every file, or of a part of a checkpoint `only` those, against the manifest.

    Args:
        advance: is told after each file how many of how many have been checked.

    Raises:
        Unreadable: the system does not hand out what is there.
        UserError: names the first file that is missing or differs, or says why the manifest cannot be used.
    """
    manifest = read(checkpoint, part=only is not None)
    names = list(manifest.files if only is None else only)
    for number, name in enumerate(names, 1):
        if _fingerprint_of(checkpoint, name) != manifest.files[name]:
            raise UserError(f"{checkpoint} is damaged: {name} does not have the size and hash that its manifest states")
        advance(number, len(names))
    return manifest


def _fingerprint_of(checkpoint: Path, name: str) -> list[Any]:
    path = checkpoint / name
    try:
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            return fingerprint(path)
    except ABSENT as error:
        raise UserError(f"{checkpoint} is damaged: {name} is missing") from error
    except OSError as error:
        raise Unreadable(checkpoint, name, error) from error
    if stat.S_ISLNK(mode):  # who removes, copies or uploads a checkpoint relies on its holding its files
        raise UserError(
            f"{checkpoint} is damaged: {name} is a symbolic link; copy what it leads to (cp -L) in its place"
        )
    raise UserError(f"{checkpoint} is damaged: {name} is missing")


def newest_valid(checkpoints: Path, rejected: Callable[[str], None] = _log.warning) -> Path | None:
    """The newest checkpoint that verifies; `rejected` hears why a newer one was passed over."""
    for step in reversed(steps(checkpoints)):
        checkpoint = checkpoints / folder_name(step)
        try:
            verify(checkpoint)
        except UserError as error:
            rejected(f"{error}; trying the one before")
            continue
        return checkpoint
    return None


def named(path: Path) -> list[Path]:
    """The checkpoints that a path may mean, the best first, whether sound or not: itself, or those of a run."""
    if (path / MANIFEST).is_file() and _NAME.fullmatch(path.resolve().name):
        return [path]
    for folder in (path / "checkpoints", path):
        if found := steps(folder):
            return [folder / folder_name(step) for step in reversed(found)]
    return []


def find(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run or of a checkpoints folder.

    Raises:
        UserError: there is none.
    """
    found = named(path)
    if found == [path]:
        return path
    newest = newest_valid(found[0].parent) if found else None
    if newest is not None:
        return newest
    raise UserError(f"{path} is no checkpoint and holds none; give a folder like runs/NAME/checkpoints/step-00000100")


@contextmanager
def being_read(checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint from being removed while its files are read.

    Raises:
        Unreadable: nobody knows whether it is.
        UserError: it is not there (any more).
    """
    try:
        handle = os.open(checkpoint / MANIFEST, os.O_RDONLY)
    except ABSENT as error:
        raise UserError(f"{checkpoint} is not a checkpoint: no readable {MANIFEST}") from error
    except OSError as error:
        raise Unreadable(checkpoint, MANIFEST, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def remove(checkpoint: Path) -> bool:
    """Remove a checkpoint, unless somebody reads it; returns whether it is gone.

    Raises:
        OSError: the system does not let go of it, or does not say whether it is read.
    """
    try:
        handle = _open_to_lock(checkpoint / MANIFEST)
    except ABSENT:
        _remove(checkpoint)
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(checkpoint)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _open_to_lock(path: Path) -> int:
    """For writing, without which NFS gives no exclusive lock (`flock(2)`); for reading where it cannot be written."""
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            raise
        return os.open(path, os.O_RDONLY)


def leftovers(checkpoints: Path, before: int | None = None) -> list[Path]:
    """What writers and removers that were killed have left, or those at work are using.

    Args:
        before: of earlier steps than this alone.
    """
    found = [path for pattern in ("step-*.tmp", "step-*.removed") for path in sorted(checkpoints.glob(pattern))]
    return [path for path in found if before is None or _is_before(path, before)]


def _is_before(path: Path, step: int) -> bool:
    match = _NAME.fullmatch(path.stem)
    return match is not None and int(match[1]) < step


def clear_leftovers(checkpoints: Path, before: int | None = None) -> None:
    """Remove what writers and removers that were killed have left; nobody may be at work there.

    Args:
        before: of earlier steps than this alone, so that those of later ones may be written.
    """
    for leftover in leftovers(checkpoints, before):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Out of sight first: a folder that is half removed must not look like a checkpoint."""
    hidden = checkpoint.with_name(f"{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    with suppress(FileNotFoundError):  # somebody clears leftovers away
        shutil.rmtree(hidden)
