"""The room: shared memory in which the ranks of a machine leave snapshots for its checkpoint service.

    ROOM/step-00000100/              a snapshot
        rank-00000.safetensors       the state of a rank, whole; while it is being written it has another name
        request.json                 what is to become of the snapshot; one rank of the machine writes it
        reserve                      memory for what the service is to write here
        manifest.json                the service has hashed the files: the snapshot can be restarted from
        written                      this machine's part of the checkpoint is on disk
        saved                        the checkpoint is committed, or is to be no more
        failed                       why it could not be written so far
    ROOM/spare/rank-00000.safetensors    of a snapshot that went: memory that the next one need not ask for

All that the two sides tell each other lies here as files, so that either may die at any moment and another goes on.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from trainer.checkpoint.chunk_file import file_name
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.checkpoint.store import folder_name, steps

_REQUEST, _WRITTEN, _SAVED, _FAILED = "request.json", "written", "saved", "failed"
_RESERVE = "reserve"
_UNFINISHED = ".part"
_FILE_ENTRY_BYTES = 256
"""More than a manifest takes for a file."""


@dataclass(frozen=True)
class Request:
    """What is to become of a snapshot."""

    facts: Manifest
    """All that the checkpoint's manifest says but its files; the same on every machine."""
    durable: bool
    """Whether it is to become a checkpoint; else it only serves restarts."""


@dataclass(frozen=True)
class Snapshot:
    """One snapshot in the room, in whatever state."""

    path: Path
    step: int
    ranks: range
    """Of this machine."""

    @property
    def files(self) -> list[str]:
        return [file_name(rank) for rank in self.ranks]

    def request(self) -> Request | None:
        try:
            tree: dict[str, Any] = orjson.loads((self.path / _REQUEST).read_bytes())
        except FileNotFoundError:
            return None
        return Request(Manifest(**tree["facts"]), tree["durable"])

    def is_complete(self) -> bool:
        """Whether all ranks of the machine have written their part."""
        return all((self.path / name).exists() for name in (*self.files, _REQUEST))

    def is_hashed(self) -> bool:
        return (self.path / MANIFEST).exists()

    def is_written(self) -> bool:
        return (self.path / _WRITTEN).exists()

    def is_saved(self) -> bool:
        return (self.path / _SAVED).exists()

    def failure(self) -> str | None:
        try:
            return (self.path / _FAILED).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def is_pending(self) -> bool:
        """Whether it is still being written by ranks, hashed, or made a checkpoint."""
        request = self.request()
        if request is None or not self.is_hashed():
            return True
        return request.durable and not self.is_saved() and self.failure() is None

    def mark_written(self) -> None:
        (self.path / _WRITTEN).touch()

    def mark_saved(self) -> None:
        (self.path / _FAILED).unlink(missing_ok=True)
        (self.path / _SAVED).touch()

    def mark_failed(self, why: str) -> None:
        (self.path / _WRITTEN).unlink(missing_ok=True)
        try:
            _write(self.path / _FAILED, why.encode())
        except OSError:  # no memory for the words
            (self.path / _FAILED).touch()

    def make_durable(self) -> None:
        """Have a snapshot that was for restarts alone become a checkpoint."""
        request = self.request()
        assert request is not None
        if not request.durable:
            self.write_request(replace(request, durable=True))

    def reserve(self) -> None:
        """Take the memory that the manifest will need, so that it is not lacking once training has gone on.

        Raises:
            OSError: there is none.
        """
        size = 2 * (self.path / _REQUEST).stat().st_size + _FILE_ENTRY_BYTES * len(self.ranks)  # indented, it is longer
        with open(self.path / _RESERVE, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def release_reserve(self) -> None:
        (self.path / _RESERVE).unlink(missing_ok=True)

    def write_request(self, request: Request) -> None:
        _write(self.path / _REQUEST, orjson.dumps({"facts": asdict(request.facts), "durable": request.durable}))


def room_path(snapshots_in: Path, run_dir: Path, node: int) -> Path:
    """Where the room of a run lies on its machine `node`: the same for every life of the run."""
    run = xxhash.xxh3_64_hexdigest(str(run_dir.resolve()).encode())
    return snapshots_in / f"broadgauge-{os.getuid()}" / run / f"node-{node:05d}"


class Room:
    """The snapshots of the ranks of one machine."""

    def __init__(self, path: Path, ranks: range) -> None:
        self.path, self.ranks = path, ranks

    def snapshots(self) -> list[Snapshot]:
        """Oldest first."""
        return [self._snapshot(step) for step in steps(self.path)]

    def restartable(self) -> Iterator[Snapshot]:
        """Those from which the ranks of this machine may go on."""
        return (each for each in self.snapshots() if each.is_complete() and each.is_hashed())

    def _snapshot(self, step: int) -> Snapshot:
        return Snapshot(self.path / folder_name(step), step, self.ranks)

    # -------------------------------------------------------------------------------------------------- the ranks' side

    def is_busy(self) -> bool:
        """Whether a snapshot is being written or saved."""
        return any(snapshot.is_pending() for snapshot in self.snapshots())

    def begin_file(self, step: int, rank: int) -> Path:
        """Where a rank writes: a spare file, if there is one, to write over."""
        path = self._snapshot(step).path / (file_name(rank) + _UNFINISHED)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(self._spare / file_name(rank), path)
        except FileNotFoundError:
            path.touch(mode=0o600)
        return path

    def finish_file(self, step: int, rank: int) -> None:
        """The rank's part is whole."""
        path = self._snapshot(step).path / file_name(rank)
        os.rename(path.with_name(path.name + _UNFINISHED), path)

    def request(self, step: int, request: Request) -> None:
        """Say what the snapshot is; for one rank of the machine."""
        snapshot = self._snapshot(step)
        snapshot.write_request(request)
        snapshot.reserve()

    def drop(self, step: int) -> None:
        """Give a snapshot up that cannot be finished, with its memory; for one rank, when none writes any more."""
        for folder in (self._snapshot(step).path, self._spare):
            shutil.rmtree(folder, ignore_errors=True)

    def void_after(self, step: int) -> None:
        """Remove the snapshots of later steps, which are no part of the history any more; for one rank."""
        for snapshot in self.snapshots():
            if snapshot.step > step:
                self.retire(snapshot)

    # ------------------------------------------------------------------------------------------- keeping the room small

    def retire(self, snapshot: Snapshot) -> None:
        """Remove a snapshot and keep its memory for the next one."""
        hidden = snapshot.path.with_name(f"{snapshot.path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(snapshot.path, hidden)  # first, so that half of it never looks like a whole one
        self._spare.mkdir(mode=0o700, exist_ok=True)
        for name in snapshot.files:
            if (hidden / name).exists() and not (self._spare / name).exists():
                os.rename(hidden / name, self._spare / name)
        shutil.rmtree(hidden)

    def tidy(self) -> None:
        """Retire what nobody needs: all that are done with but the newest that can be restarted from."""
        done = [each for each in self.snapshots() if each.is_complete() and not each.is_pending()]
        for snapshot in done[:-1]:
            self.retire(snapshot)

    def clear_unfinished(self) -> None:
        """Remove snapshots that the ranks did not finish; none may be alive."""
        for leftover in self.path.glob("step-*.removed"):
            shutil.rmtree(leftover, ignore_errors=True)
        for snapshot in self.snapshots():
            if not snapshot.is_complete():
                self.retire(snapshot)

    def remove(self) -> None:
        """Give all memory back; nobody may use the room any more."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self.path.parents[:2]:  # of the run and of the user, shared with other rooms
            with suppress(OSError):
                parent.rmdir()

    @property
    def _spare(self) -> Path:
        return self.path / "spare"


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; in memory nothing needs to be made durable."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
