"""What the checkpoint service of a machine does: snapshots in the room become checkpoints on disk.

    hash the files -> write them, and read them back from the disk -> (machine 0) commit when all machines have -> prune

One service per machine, each for the ranks there; they meet in the temporary folder of the checkpoint, where each
leaves a manifest of its own part. A pass does what can be done now, and remembers nothing that is not on disk or in the
room: a service that is killed is replaced by a new one, which sees on disk how far the other came. It goes by the
manifests there, never by what was meant to be there: a folder may have been cleared away, or be of an earlier attempt.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.format import retention, store
from trainer.checkpoint.format.disk import copy_durably, fingerprint_on_disk, reason_of
from trainer.checkpoint.format.manifest import MANIFEST, Manifest, fingerprint, read_manifest, write_manifest
from trainer.checkpoint.service.room import Room, Snapshot
from trainer.config import CheckpointConfig, UserError

Record = Callable[..., None]
"""Appends an event of a kind with its fields."""

_POLL_SECONDS = 0.01
_OTHERS_SECONDS = 600.0
"""How long the first machine waits for the others' parts before it lets the ranks begin another snapshot."""
_LAST_OTHERS_SECONDS = 60.0
"""The same, when the ranks have ended."""
_RETRY_SECONDS = 5.0
"""Between attempts to write a snapshot that could not be written, for as long as no newer one is there."""


@dataclass(frozen=True)
class Machine:
    """Which of the run's machines a service is on."""

    node: int
    num_nodes: int


class CheckpointService:
    """The work of one machine's service."""

    def __init__(
        self,
        room: Room,
        checkpoints: Path,
        policy: CheckpointConfig,
        record: Record,
        machine: Machine = Machine(0, 1),
        clock: Callable[[], float] = time.monotonic,
        sync_records: Callable[[], None] = lambda: None,
    ) -> None:
        """`sync_records` waits until the disk has all that was recorded, by this and other processes."""
        self._room, self._checkpoints, self._policy = room, checkpoints, policy
        self._record, self._sync_records = record, sync_records
        self._machine, self._clock = machine, clock
        self._retry_at: dict[str, float] = {}  # identity of a snapshot -> when it may be tried again
        self._waiting_since: dict[str, float] = {}  # the same -> when this machine's part was there

    def work(self) -> bool:
        """One pass over the room; returns whether anything was done."""
        did_something = self._hash_all()
        self._room.tidy()  # where a newer one is to be saved, one that the first machine gave up is not written again
        for snapshot in self._to_save():
            did_something |= self._attempt(snapshot, self._advance)
        self._room.tidy()
        return did_something

    def is_idle(self) -> bool:
        """Whether no complete snapshot waits to be hashed, saved or committed, but those that could not be."""
        return not any(
            each.is_complete() and (each.is_pending() or each.is_written()) for each in self._room.snapshots()
        )

    def finish(self, *, may_wait: bool = True) -> None:
        """The ranks have ended: save what is there, once more what could not be, and give the memory back.

        On a single machine the newest snapshot becomes a checkpoint too, if it was not to be one: memory is no place to
        leave it. What could not be saved stays in the room.

        Args:
            may_wait: for other machines to do their part, a minute at most.
        """
        self._retry_at.clear()
        self._hash_all()
        if self._machine.num_nodes == 1:
            for snapshot in list(self._room.restartable())[-1:]:
                snapshot.make_durable()
        deadline = self._clock() + (_LAST_OTHERS_SECONDS if may_wait else 0.0)
        while self.work() or (not self.is_idle() and self._clock() < deadline):
            time.sleep(_POLL_SECONDS)
        left = list(self._room.restartable())
        if all(snapshot.is_saved() for snapshot in left[-1:]) and not any(snapshot.is_owed() for snapshot in left):
            self._room.remove()

    # -------------------------------------------------------------------------------------------------------- hashing

    def _hash_all(self) -> bool:
        waiting = [each for each in self._room.snapshots() if each.is_complete() and not each.is_hashed()]
        did_something = False
        for snapshot in waiting:
            did_something |= self._attempt(snapshot, self._hash)
        return did_something

    def _hash(self, snapshot: Snapshot) -> bool:
        """Vouch for the snapshot's files as they are in memory, which everything later is compared with."""
        request = snapshot.request()
        if request is None:
            return False
        vouched = replace(request.facts, files={each: fingerprint(snapshot.path / each) for each in snapshot.files})
        try:
            write_manifest(snapshot.path, vouched)
        except FileNotFoundError:  # the ranks went back to an earlier step and removed it
            return False
        except OSError:  # somebody else has filled the memory to the last page: there is one in what we keep for later
            self._room.free_spare()
            self._hash_or_drop(snapshot, vouched)
        return True

    def _hash_or_drop(self, snapshot: Snapshot, vouched: Manifest) -> None:
        try:
            write_manifest(snapshot.path, vouched)
        except OSError as error:  # nobody may wait for memory that others have
            self._room.drop(snapshot.step)
            with suppress(OSError):
                reason = f"no snapshot in shared memory: {reason_of(error)}"
                self._record("checkpoint_failed", step=snapshot.step, reason=reason)

    # --------------------------------------------------------------------------------------------------------- saving

    def _to_save(self) -> list[Snapshot]:
        """Oldest first; of those that could not be saved so far only the newest is tried again."""
        waiting = [snapshot for snapshot in self._room.restartable() if snapshot.is_owed()]
        return [each for each in waiting if each is waiting[-1] or each.failure() is None]

    def _attempt(self, snapshot: Snapshot, action: Callable[[Snapshot], bool]) -> bool:
        """Bring a snapshot further on its way to disk; returns whether it got anywhere."""
        identity = snapshot.identity()
        if self._clock() < self._retry_at.get(identity, -math.inf):
            return False
        try:
            return action(snapshot)
        except (OSError, UserError, store.SaveFailed) as error:
            if snapshot.identity() == identity:  # else the ranks went back to an earlier step, and may be here again
                self._fail(snapshot, reason_of(error) if isinstance(error, OSError) else str(error))
            return False

    def _fail(self, snapshot: Snapshot, why: str) -> None:
        self._retry_at[snapshot.identity()] = self._clock() + _RETRY_SECONDS
        if snapshot.failure() == why:
            return
        with suppress(OSError):  # the record may lie on the disk that is full
            self._record("checkpoint_failed", step=snapshot.step, reason=why)
        with suppress(OSError):
            snapshot.mark_failed(why)

    def _advance(self, snapshot: Snapshot) -> bool:
        own, started = snapshot.manifest(), self._clock()
        if own is None:
            return False
        own = replace(own, files={each: own.files[each] for each in snapshot.files if each in own.files})
        did_write = not self._is_written(own)
        if did_write:
            self._write(snapshot, own)
        if self._machine.node > 0:
            return self._await_commit(snapshot, own) or did_write
        committed = self._commit(own)
        if committed is None:
            return did_write
        checkpoint, manifest = committed
        self._record(
            "checkpoint_saved",
            step=snapshot.step,
            path=str(checkpoint),
            bytes=manifest.num_bytes,
            seconds=round(self._clock() - started, 6),
        )
        with suppress(OSError):  # what could not be removed is after the next save
            store.clear_leftovers(self._checkpoints, before=own.step)
            retention.prune(self._checkpoints, own.step, self._policy)
        self._mark_saved(snapshot, own)  # last: whoever takes over does all that was not done yet
        return True

    def _await_commit(self, snapshot: Snapshot, own: Manifest) -> bool:
        """Of a machine whose part is written: see whether the first one has committed; returns whether that is news.

        The ranks need not wait for that here. Until then the part is written again should it be cleared away, and the
        snapshot stays, but where the first machine gave this checkpoint up and the ranks have come to the next.
        """
        if _found(self._checkpoints / store.folder_name(own.step), own) is not None:
            self._mark_saved(snapshot, own)
        elif not snapshot.is_written():
            self._room.tidy(snapshot)
            snapshot.mark_written(own)
        else:
            return False
        return True

    def _mark_saved(self, snapshot: Snapshot, own: Manifest) -> None:
        self._room.tidy(snapshot)
        snapshot.mark_saved(own)

    def _is_written(self, own: Manifest) -> bool:
        """Whether this machine's part is on disk, or already in the checkpoint; in the order in which it moves."""
        temporary = store.temporary_folder(self._checkpoints, own.step)
        return _found(temporary, own, _part(self._machine.node)) == own or self._whole(own) is not None

    def _write(self, snapshot: Snapshot, own: Manifest) -> None:
        """Write this machine's part, and see that the disk has what was in memory.

        Raises:
            OSError: the disk is full, or does not let us write.
            SaveFailed: it holds something else than was written.
        """
        temporary = store.temporary_folder(self._checkpoints, own.step)
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            for name, expected in own.files.items():
                copy_durably(snapshot.path / name, temporary / name)
                if fingerprint_on_disk(temporary / name) != expected:
                    raise store.SaveFailed(f"{temporary / name} reads back other than it was written")
            write_manifest(temporary, own, _part(self._machine.node))
        except (OSError, store.SaveFailed):
            self._remove_part(temporary, own)
            raise

    def _remove_part(self, temporary: Path, own: Manifest) -> None:
        """Leave the disk to others, who may have filled it."""
        with suppress(OSError):
            for name in (*own.files, f"{_part(self._machine.node)}.tmp"):
                (temporary / name).unlink(missing_ok=True)
            temporary.rmdir()  # unless other machines' parts are there

    def _commit(self, own: Manifest) -> tuple[Path, Manifest] | None:
        """The checkpoint, once all machines have written their parts.

        Raises:
            OSError: it cannot be committed.
            SaveFailed: the parts are not the whole state, or have not come for too long.
        """
        already = self._whole(own)
        if already is not None and already[0] == self._checkpoints / store.folder_name(own.step):
            return already
        manifest = already[1] if already is not None else self._put_together(own)
        if manifest is None:
            return None
        self._sync_records()  # no checkpoint of steps of which the events may yet be lost
        return store.commit_whole(store.temporary_folder(self._checkpoints, own.step), manifest), manifest

    def _whole(self, own: Manifest) -> tuple[Path, Manifest] | None:
        """The folder and manifest of the whole checkpoint, committed or nearly so, if a service came that far."""
        final = self._checkpoints / store.folder_name(own.step)
        for folder in (store.temporary_folder(self._checkpoints, own.step), final):
            manifest = _found(folder, own)
            if manifest is not None:
                return folder, manifest
        return None

    def _put_together(self, own: Manifest) -> Manifest | None:
        """The manifest of all machines' files together, once all have written theirs.

        Raises:
            SaveFailed: some have not for too long.
        """
        temporary = store.temporary_folder(self._checkpoints, own.step)
        parts = [_found(temporary, own, _part(node)) for node in range(self._machine.num_nodes)]
        absent = [str(node) for node, part in enumerate(parts) if part is None]
        since = self._waiting_since.setdefault(own.identity, self._clock())
        if absent and self._clock() - since > _OTHERS_SECONDS:
            raise store.SaveFailed(f"after {_OTHERS_SECONDS:g} s there is no part of machine {', '.join(absent)}")
        files: dict[str, list[Any]] = {}
        for part in parts:
            files |= part.files if part else {}
        if absent:
            return None
        if own.num_files not in (None, len(files)):
            raise store.SaveFailed(f"the machines have written {len(files)} of {own.num_files} files")
        return replace(own, files=files)


def _found(folder: Path, own: Manifest, name: str = MANIFEST) -> Manifest | None:
    """The manifest there, if it is of this very checkpoint and not of an earlier attempt at it."""
    try:
        manifest = read_manifest(folder, name)
    except UserError:
        return None
    return manifest if manifest.is_of(own) else None


def _part(node: int) -> str:
    return f"part-{node:05d}.{MANIFEST}"
