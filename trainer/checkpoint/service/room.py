"""The room: shared memory in which the ranks of a machine leave snapshots for its checkpoint service.

    ROOM/step-00000100/              a snapshot
        rank-00000.safetensors       the state of a rank, whole; while it is being written it has another name
        request.json                 what is to become of the snapshot; one rank of the machine writes it
        manifest.json                the service has hashed the files: the snapshot can be restarted from
        written                      this machine's part is on disk; whether it is committed the first machine decides
        saved                        it is part of a committed checkpoint
        failed                       why it could not be written so far
        copied                       the next machine holds it too
    ROOM/run                         the path of the run whose memory it is
    ROOM/spare/rank-00000.safetensors    of a snapshot that went: memory that the next one need not ask for

All that the two sides tell each other lies here as files, so that either may die at any moment and another goes on.
A file that cannot be understood counts as not there. Folders are for their owner alone, and one that somebody else has
made, or may write to, is neither used nor believed: others are on the machine too.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson
import xxhash

from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.manifest import Manifest, read_manifest
from trainer.checkpoint.format.store import folder_name, steps
from trainer.config import UserError

_REQUEST, _WRITTEN, _SAVED, _FAILED, _COPIED = "request.json", "written", "saved", "failed", "copied"
_UNFINISHED, _REMOVED, _RUN = ".part", ".removed", "run"
_USERS_FOLDER = f"broadgauge-{os.getuid()}"


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
            tree = orjson.loads((self.path / _REQUEST).read_bytes())
            return Request(Manifest(**tree["facts"]), bool(tree["durable"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def identity(self) -> str:
        """Of the checkpoint that it is to be, as far as that is known."""
        request = self.request()
        return request.facts.identity if request else ""

    def manifest(self) -> Manifest | None:
        """Of the machine's files, once they are hashed."""
        request = self.request()
        try:
            found = read_manifest(self.path)
        except UserError:
            return None
        return found if request is not None and found.is_of(request.facts) else None

    def is_complete(self) -> bool:
        """Whether all ranks of the machine have written their part."""
        return all((self.path / name).exists() for name in self.files) and self.request() is not None

    def is_hashed(self) -> bool:
        return self.manifest() is not None

    def is_saved(self) -> bool:
        """Whether it became a checkpoint: it, and not one of the same step that was here before."""
        return self._is_marked(_SAVED)

    def _is_marked(self, name: str) -> bool:
        try:
            return (self.path / name).read_text(encoding="utf-8", errors="replace") == self.identity() != ""
        except FileNotFoundError:
            return False

    def failure(self) -> str | None:
        try:
            return (self.path / _FAILED).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def is_pending(self) -> bool:
        """Whether the ranks have to wait: it is still being written by them, hashed, or written to disk.

        For the commit they wait on the first machine alone, which fails or gives up where there is none.
        """
        request = self.request()
        if request is None or not self.is_hashed():
            return self.path.exists()  # else it was retired while we looked
        return self.is_owed() and not self._is_marked(_WRITTEN) and self.failure() is None

    def is_copied(self) -> bool:
        """Whether another machine holds it too."""
        return self._is_marked(_COPIED)

    def mark_copied(self, facts: Manifest) -> None:
        _write(self.path / _COPIED, facts.identity.encode())

    def is_owed(self) -> bool:
        """Whether it is to become a checkpoint and has not, even if that has failed so far."""
        request = self.request()
        return request is not None and request.durable and not self.is_saved()

    def is_written(self) -> bool:
        """Whether this machine has done its part, and the checkpoint is not there yet as far as is known here."""
        return self.is_owed() and self._is_marked(_WRITTEN)

    def mark_written(self, facts: Manifest) -> None:
        _write(self.path / _WRITTEN, facts.identity.encode())
        (self.path / _FAILED).unlink(missing_ok=True)

    def mark_saved(self, facts: Manifest) -> None:
        _write(self.path / _SAVED, facts.identity.encode())
        (self.path / _FAILED).unlink(missing_ok=True)

    def mark_failed(self, why: str) -> None:
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

    def write_request(self, request: Request) -> None:
        _write(self.path / _REQUEST, orjson.dumps({"facts": asdict(request.facts), "durable": request.durable}))


def room_path(snapshots_in: Path, run_dir: Path, run_id: str, node: int) -> Path:
    """Where the room of a run lies on its machine `node`: the same for every life of the run.

    Args:
        run_id: as `RunDir.id`: what an earlier run of the same folder has left is none of this one's.
    """
    run = xxhash.xxh3_64_hexdigest(f"{run_id} {run_dir.resolve()}".encode())
    return snapshots_in / _USERS_FOLDER / run / f"node-{node:05d}"


class Room:
    """The snapshots of the ranks of one machine."""

    def __init__(self, path: Path, ranks: range, *, is_replicated: bool = False) -> None:
        """`is_replicated`: whether another machine keeps copies of the snapshots."""
        self.path, self.ranks, self._is_replicated = path, ranks, is_replicated

    def snapshots(self) -> list[Snapshot]:
        """Oldest first."""
        return [self._snapshot(step) for step in steps(self.path)] if self._is_ours() else []

    def restartable(self) -> Iterator[Snapshot]:
        """Those from which the ranks of this machine may go on."""
        return (each for each in self.snapshots() if each.is_complete() and each.is_hashed())

    def _is_ours(self) -> bool:
        return _is_ours(_gate(self.path))

    def _snapshot(self, step: int) -> Snapshot:
        return Snapshot(self.path / folder_name(step), step, self.ranks)

    # -------------------------------------------------------------------------------------------------- the ranks' side

    def is_busy(self) -> bool:
        """Whether a snapshot is being written or saved."""
        return any(snapshot.is_pending() for snapshot in self.snapshots())

    def is_copying(self) -> bool:
        """Whether the newest snapshot has no copy yet, where it is to have one."""
        return self._is_replicated and not all(snapshot.is_copied() for snapshot in self.snapshots()[-1:])

    def make(self) -> None:
        """See that the room is there, and that others on the machine cannot look into it.

        Raises:
            OSError: it cannot be made, or others can write to it.
        """
        _make_private(self.path)

    def sign(self, run_dir: Path) -> None:
        """Say whose memory it is, for whoever finds it; for the service. Memory that is refused is not signed."""
        with suppress(OSError):
            self.make()
            _write(self.path / _RUN, f"{run_dir.resolve()}\n".encode())

    def begin_file(self, step: int, rank: int) -> Path:
        """Where a rank writes: a spare file, if there is one, to write over.

        Raises:
            OSError: there is no room, or others can write to it.
        """
        path = self._snapshot(step).path / (file_name(rank) + _UNFINISHED)
        _make_private(path.parent)
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
        self._snapshot(step).write_request(request)

    def drop(self, step: int) -> None:
        """Give a snapshot up that cannot be finished, with its memory; for one rank, when none writes any more."""
        self._give_back(self._snapshot(step).path)
        self.free_spare()

    def void_after(self, step: int) -> None:
        """Remove the snapshots of later steps, which are no part of the history any more; for one rank."""
        for snapshot in self.snapshots():
            if snapshot.step > step:
                self.retire(snapshot)

    # ------------------------------------------------------------------------------------------- keeping the room small

    def retire(self, snapshot: Snapshot) -> None:
        """Remove a snapshot and keep its memory for the next one; the other side may be doing the same."""
        hidden = snapshot.path.with_name(snapshot.path.name + _REMOVED)
        self._reclaim(hidden)
        with suppress(FileNotFoundError):
            os.rename(snapshot.path, hidden)  # first, so that half of it never looks like a whole one
        self._reclaim(hidden)

    def _reclaim(self, hidden: Path) -> None:
        for rank in self.ranks:
            with suppress(FileNotFoundError):
                self._spare.mkdir(mode=0o700, exist_ok=True)
                if not (self._spare / file_name(rank)).exists():
                    os.rename(hidden / file_name(rank), self._spare / file_name(rank))
        shutil.rmtree(hidden, ignore_errors=True)

    def tidy(self, saved: Snapshot | None = None) -> None:
        """Retire what nobody needs: all that are done with but the newest that can be restarted from.

        What could not be saved stays until a newer one is to be saved. Where snapshots are copied, the one before the
        newest stays too: for as long as any machine is still copying the newest, it is the one that survives a loss.

        Args:
            saved: is about to be marked so, and the ranks may then begin the next at once, in memory that is there.
        """
        restartable = list(self.restartable())
        owed = [each for each in restartable if each.is_owed()]
        done = [each for each in restartable if each == saved or not each.is_pending()]
        for snapshot in done[: -2 if self._is_replicated else -1]:
            if snapshot not in owed[-1:]:
                self.retire(snapshot)
        self._clear_removed()

    def free_spare(self) -> None:
        """Give the memory back that waits for the next snapshot."""
        self._give_back(self._spare)

    def clear_unfinished(self) -> None:
        """Remove snapshots that the ranks did not finish; none may be alive, and nobody fetch one."""
        self._clear_removed()
        for begun in self.path.glob("step-*.tmp"):
            self._give_back(begun)
        for snapshot in self.snapshots():
            if not snapshot.is_complete():
                self.retire(snapshot)

    def _clear_removed(self) -> None:
        """What a process that was killed was about to remove."""
        for hidden in self.path.glob(f"step-*{_REMOVED}") if self._is_ours() else ():
            self._reclaim(hidden)

    def remove(self) -> None:
        """Give all memory back; nobody may use the room any more."""
        self._give_back(self.path)
        for parent in self.path.parents[:2]:  # of the run and of the user, shared with other rooms
            with suppress(OSError):
                parent.rmdir()

    def _give_back(self, path: Path) -> None:
        if self._is_ours():
            shutil.rmtree(path, ignore_errors=True)

    @property
    def _spare(self) -> Path:
        return self.path / "spare"


def _make_private(folder: Path) -> None:
    """Make a folder and those that it is in.

    Raises:
        OSError: they cannot be made, or others were there first: anybody may make `/dev/shm/broadgauge-1000`.
    """
    for each in (*reversed(folder.parents), folder):
        with suppress(FileExistsError):
            each.mkdir(mode=0o700)
        if each == _gate(folder) and not _is_ours(each):
            raise PermissionError(errno.EACCES, "not a folder of yours that you alone can write to", str(each))


def _gate(folder: Path) -> Path:
    """The folder that keeps others out of all that is in it."""
    return next((each for each in folder.parents if each.name == _USERS_FOLDER), folder)


def _is_ours(folder: Path) -> bool:
    """Whether nobody else may change what is in it; or it does not exist."""
    try:
        found = folder.lstat()  # not of what a symbolic link leads to
    except FileNotFoundError:
        return True
    except OSError:  # what it should be in is no folder, or is closed to us
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; in memory nothing needs to be made durable."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
