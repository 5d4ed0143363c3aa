"""The durable copy of checkpoints, at a folder or URL that outlives the machines.

A checkpoint there is `step-<n>/` with the same files as here. Object stores cannot rename, so its manifest is written
last: from then on it exists. Each machine sends its own files, and then one of them commits. Beside every file that has
arrived whole lies an object whose name ends in the file's hash, so that a retry sends no file twice and the one that
commits knows, from a single listing, that what others sent is what the manifest lists.

Trouble with the store is `RemoteFailed`, which a retry may mend; a copy or a folder that is not what its manifest says
is a `UserError`. One run only may write to a URL.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import xxhash

from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import (
    ABSENT,
    MANIFEST,
    Manifest,
    Unreadable,
    manifest_bytes,
    parse_manifest,
    read_manifest,
)
from trainer.checkpoint.remote.object_store import PIECE_BYTES, TIMEOUT_SECONDS, ObjectStore, RemoteFailed
from trainer.config import UserError

_HASH = ".xxh3-"
_FILES_AT_ONCE = 4  # each holds about three pieces in memory
_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Remote:
    """The copies at one URL."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    @classmethod
    def open(cls, url: str, *, timeout_seconds: float = TIMEOUT_SECONDS, piece_bytes: int = PIECE_BYTES) -> "Remote":
        """Open a folder or a URL that fsspec knows, in the process that uses it (never before a fork).

        Args:
            url: where the folders `step-<n>` are, or will be.
            timeout_seconds: how long a single operation, such as sending one piece, may take.
            piece_bytes: how much is sent or read at once; S3 takes no less than 5 MiB.

        Raises:
            UserError: the URL makes no sense, its driver is not installed, or no store answers there.
        """
        return cls(ObjectStore(url, timeout_seconds=timeout_seconds, piece_bytes=piece_bytes))

    @property
    def url(self) -> str:
        return self._objects.url

    def check(self) -> None:
        """List, write, read and remove there, before a run relies on it.

        Raises:
            UserError: one of them fails.
        """
        probe, content = f".probe-{uuid4().hex}", b"may be removed"
        try:
            self._objects.listing()
            self._objects.put(probe, content)
            if self._objects.get(probe) != content:
                raise RemoteFailed(f"{self.url}: what was written cannot be read back")
            self._objects.remove(probe)
        except RemoteFailed as error:
            raise UserError(f"{error}; check the URL, your credentials and the network") from error

    # ------------------------------------------------------------------------------------------------------------ there

    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist there, oldest first: one listing, and the manifest of each."""
        found = self._folders()
        exist = _at_once(self._exists, found)
        return [step for step, exists in zip(found, exist, strict=True) if exists]

    def unfinished(self) -> list[int]:
        """Steps whose upload or removal has not ended, oldest first; those that nobody is at work on may be pruned.

        One whose manifest is damaged, or of another version, is not among them.
        """
        found = self._folders()
        sizes = _at_once(lambda step: self._objects.size(_inside(step, MANIFEST)), found)
        return [step for step, size in zip(found, sizes, strict=True) if size is None]

    def read_manifest(self, step: int) -> Manifest:
        """Raises:
        UserError: there is none, or it is not valid.
        RemoteFailed: the store does.
        """
        checkpoint = self._name(step)
        content = self._objects.get(_inside(step, MANIFEST))
        if content is None:
            raise UserError(f"{checkpoint} is not a checkpoint: no readable {MANIFEST}")
        manifest = parse_manifest(content, checkpoint)
        if manifest.step != step:
            raise UserError(f"{checkpoint} is not a checkpoint of its step: its {MANIFEST} is of step {manifest.step}")
        return manifest

    def prune(self, steps: Iterable[int]) -> None:
        """Remove checkpoints, or what is left of them. The manifest goes first, so that what is half removed is none.

        Raises:
            RemoteFailed: the store does; call it again.
        """
        for step in steps:
            self._objects.remove(_inside(step, MANIFEST))
            left = self._objects.listing(store.folder_name(step)).items()
            _at_once(self._objects.remove, [_inside(step, name) for name, size in left if size is not None])
            self._objects.remove_folder(store.folder_name(step))

    # --------------------------------------------------------------------------------------------------------- to there

    def upload(self, folder: Path, only: Iterable[str] | None = None) -> int:
        """Send the files of a committed checkpoint, or `only` those, that are not there yet; returns the bytes sent.

        Where something is sent for a step that exists there already, with other content, that one ceases to exist.

        Raises:
            Unreadable: the system does not hand it out just now.
            UserError: the checkpoint is not what its manifest says.
            RemoteFailed: the store does; another call goes on from there.
        """
        with store.being_read(folder):
            manifest = read_manifest(folder)
            wanted = {name: manifest.files[name] for name in (manifest.files if only is None else only)}
            there = self._objects.listing(store.folder_name(manifest.step))
            missing = [name for name, entry in wanted.items() if not _has(there, name, entry)]
            if missing and MANIFEST in there:
                self._objects.remove(_inside(manifest.step, MANIFEST))
            return sum(_at_once(lambda name: self._send(folder, manifest, name, there), missing))

    def _send(self, folder: Path, manifest: Manifest, name: str, there: Iterable[str]) -> int:
        entry, path = manifest.files[name], _inside(manifest.step, name)
        for stale in [other for other in there if other.startswith(name + _HASH)]:
            self._objects.remove(_inside(manifest.step, stale))
        try:
            found = self._objects.put_file(path, folder / name)
        except ABSENT as error:
            raise UserError(f"{folder} is damaged: {name} is missing") from error
        except OSError as error:
            raise Unreadable(folder, name, error) from error
        if found != entry:
            raise UserError(f"{folder} is damaged: {name} does not have the size and hash that its manifest states")
        arrived = self._objects.size(path)
        if arrived != entry[0]:
            raise RemoteFailed(f"{self.url}: {path} was sent with {entry[0]} bytes and has {arrived}")
        self._objects.put(_inside(manifest.step, _hash_name(name, entry)), b"%d bytes\n" % entry[0])
        return int(entry[0])

    def lacks(self, manifest: Manifest) -> list[str]:
        """Files of a checkpoint that have not arrived.

        Raises:
            RemoteFailed: the store does.
        """
        there = self._objects.listing(store.folder_name(manifest.step))
        return [name for name, entry in manifest.files.items() if not _has(there, name, entry)]

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint exist whose files have all been sent. The manifest must list those of every machine.

        Raises:
            RemoteFailed: not all of them are there, or the store fails; a retry of what did not arrive goes on.
        """
        assert manifest.is_whole, "a checkpoint is committed with all files of all machines"
        step, content = manifest.step, manifest_bytes(manifest)
        there = self._objects.listing(store.folder_name(step))
        lacking = [name for name, entry in manifest.files.items() if not _has(there, name, entry)]
        if lacking:
            raise RemoteFailed(
                f"{self.url}: {len(lacking)} of {len(manifest.files)} files of step {step} are not there, such as "
                f"{lacking[0]}"
            )
        if MANIFEST in there:
            if self._objects.get(_inside(step, MANIFEST)) == content:
                return
            self._objects.remove(_inside(step, MANIFEST))
        ours = {*manifest.files, *(_hash_name(name, entry) for name, entry in manifest.files.items()), MANIFEST}
        for name, size in there.items():
            if name not in ours and size is not None:  # of an earlier life, in another layout
                self._objects.remove(_inside(step, name))
        self._objects.put(_inside(step, MANIFEST), content)
        if self._objects.get(_inside(step, MANIFEST)) != content:
            with suppress(RemoteFailed):
                self._objects.remove(_inside(step, MANIFEST))
            raise RemoteFailed(f"{self.url}: the {MANIFEST} of step {step} was sent and reads differently")

    # ------------------------------------------------------------------------------------------------------- from there

    def fetch(self, step: int, checkpoints: Path, only: Iterable[str] | None = None) -> Path:
        """Copy a checkpoint, or `only` those of its files, into a folder of checkpoints; returns its own folder.

        It exists here once every file has been checked and is durable; before that, and if anything fails, what was
        here stays as it was. A checkpoint of the same step that is here is replaced.

        Raises:
            UserError: the copy is damaged.
            RemoteFailed: the store does.
            OSError: it cannot be written here.
        """
        manifest = self.read_manifest(step)
        if only is not None:
            total = manifest.num_files or len(manifest.files)
            manifest = replace(manifest, files={name: manifest.files[name] for name in only}, num_files=total)
        there = self._objects.listing(store.folder_name(step))
        for name, (num_bytes, _) in manifest.files.items():
            if there.get(name) != num_bytes:
                found = f"has {there[name]} bytes of {num_bytes}" if name in there else "is missing"
                raise UserError(f"{self._name(step)} is damaged: {name} {found}")
        temporary = store.begin(checkpoints, step)
        try:
            _at_once(lambda name: self._receive(step, name, manifest.files[name], temporary), manifest.files)
            return store.commit(temporary, manifest)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _receive(self, step: int, name: str, entry: list[Any], folder: Path) -> None:
        digest = xxhash.xxh3_128()
        with open(folder / name, "wb") as file:
            for piece in self._objects.pieces(_inside(step, name), entry[0]):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if [file.tell(), digest.hexdigest()] != entry:
                raise UserError(
                    f"{self._name(step)} is damaged: {name} does not have the size and hash that its manifest states"
                )

    def fetch_newest(
        self, checkpoints: Path, newer_than: int = -1, rejected: Callable[[str], None] = _log.warning
    ) -> Path | None:
        """Fetch the newest checkpoint of a step after `newer_than` that is whole; None if there is none.

        `rejected` hears why a newer one was passed over. Raises as `fetch` does, but for damaged copies.
        """
        unfinished = self.unfinished()
        for step in reversed(self._folders()):
            if step <= newer_than:
                break
            if step in unfinished:
                continue
            try:
                return self.fetch(step, checkpoints)
            except UserError as error:
                rejected(f"{error}; trying the one before")
        return None

    def _name(self, step: int) -> str:
        return f"{self.url.rstrip('/')}/{store.folder_name(step)}"

    def _exists(self, step: int) -> bool:
        try:
            self.read_manifest(step)
        except UserError:
            return False
        return True

    def _folders(self) -> list[int]:
        found = (store.step_of(name) for name in self._objects.listing())
        return sorted(step for step in found if step is not None)


def _inside(step: int, name: str) -> str:
    return f"{store.folder_name(step)}/{name}"


def _hash_name(name: str, entry: list[Any]) -> str:
    return f"{name}{_HASH}{entry[1]}"


def _has(there: dict[str, int | None], name: str, entry: list[Any]) -> bool:
    """Whether a listing shows that a file has arrived as its manifest states it, [bytes, hash]."""
    return there.get(name) == entry[0] and _hash_name(name, entry) in there


def _at_once(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """The results of work on several items at a time; a failure is raised once nobody is at work any more."""
    pool = ThreadPoolExecutor(_FILES_AT_ONCE)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)
