"""What the checkpoint service of a machine does: snapshots in the room become checkpoints on disk.

    hash the files -> write them, and read them back from the disk -> (machine 0) commit when all machines have -> prune

One service per machine, each for the ranks there; they meet in the temporary folder of the checkpoint, where each
leaves a manifest of its own part. A pass does what can be done now, and remembers nothing that is not on disk or in the
room: a service that is killed is replaced by a new one.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint import retention, store
from trainer.checkpoint.disk import copy_durably, fingerprint_on_disk, reason_of
from trainer.checkpoint.manifest import MANIFEST, Manifest, fingerprint, read_manifest, write_manifest
from trainer.checkpoint.room import Room, Snapshot
from trainer.config import CheckpointConfig, UserError
from trainer.events import EventLog

_POLL_SECONDS = 0.01
_OTHERS_SECONDS = 60.0
"""How long the first machine waits for the others' parts when the ranks have ended."""
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
        log: EventLog,
        machine: Machine = Machine(0, 1),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._room, self._checkpoints, self._policy = room, checkpoints, policy
        self._log, self._machine, self._clock = log, machine, clock
        self._retry_at: dict[int, float] = {}  # step -> when it may be tried again

    def work(self) -> bool:
        """One pass over the room; returns whether anything was done."""
        did_something = False
        for snapshot in self._room.snapshots():
            if snapshot.is_complete() and not snapshot.is_hashed():
                self._hash(snapshot)
                did_something = True
        for snapshot in self._to_save():
            did_something |= self._attempt(snapshot)
        self._room.tidy()
        return did_something

    def is_idle(self) -> bool:
        """Whether no complete snapshot waits to be hashed or saved, but those that could not be."""
        return not any(each.is_complete() and each.is_pending() for each in self._room.snapshots())

    def finish(self) -> None:
        """The ranks have ended: save what is there, once more what could not be, and give the memory back.

        On a single machine the newest snapshot becomes a checkpoint too, if it was not to be one: memory is no place to
        leave it. What could not be saved stays in the room.
        """
        if self._machine.num_nodes == 1:
            for snapshot in list(self._room.restartable())[-1:]:
                snapshot.make_durable()
        self._retry_at.clear()
        deadline = self._clock() + _OTHERS_SECONDS
        while self.work() or (not self.is_idle() and self._clock() < deadline):
            time.sleep(_POLL_SECONDS)
        if all(snapshot.is_saved() or not snapshot.is_complete() for snapshot in self._room.snapshots()):
            self._room.remove()

    # -------------------------------------------------------------------------------------------------------- hashing

    def _hash(self, snapshot: Snapshot) -> None:
        """Vouch for the snapshot's files as they are in memory, which everything later is compared with."""
        with suppress(FileNotFoundError):  # the ranks went back to an earlier step and removed it
            request = snapshot.request()
            assert request is not None
            files = {name: fingerprint(snapshot.path / name) for name in snapshot.files}
            write_manifest(snapshot.path, replace(request.facts, files=files))

    # --------------------------------------------------------------------------------------------------------- saving

    def _to_save(self) -> list[Snapshot]:
        def wants_saving(snapshot: Snapshot) -> bool:
            request = snapshot.request() if snapshot.is_complete() and snapshot.is_hashed() else None
            return request is not None and request.durable and not snapshot.is_saved()

        waiting = [snapshot for snapshot in self._room.snapshots() if wants_saving(snapshot)]
        newest_first = waiting[::-1]
        return [each for each in waiting if each is newest_first[0] or each.failure() is None]

    def _attempt(self, snapshot: Snapshot) -> bool:
        """Bring a snapshot further on its way to disk; returns whether it got anywhere."""
        if snapshot.failure() is not None and self._clock() < self._retry_at.get(snapshot.step, 0.0):
            return False
        try:
            return self._advance(snapshot)
        except (OSError, UserError, store.SaveFailed) as error:
            if not snapshot.path.exists():  # the ranks went back to an earlier step and removed it
                return False
            why = reason_of(error) if isinstance(error, OSError) else str(error)
            if snapshot.failure() != why:
                self._log.write("checkpoint_failed", step=snapshot.step, reason=why)
            snapshot.mark_failed(why)
            self._retry_at[snapshot.step] = self._clock() + _RETRY_SECONDS
            return False

    def _advance(self, snapshot: Snapshot) -> bool:
        did_write = not snapshot.is_written()
        started = self._clock()
        if did_write:
            self._write(snapshot)
            snapshot.mark_written()
        if self._machine.node > 0:
            snapshot.mark_saved()
            return did_write
        manifest = self._whole_manifest(read_manifest(snapshot.path))
        if manifest is None:  # other machines are still at it
            return did_write
        self._log.sync()  # no checkpoint of steps of which the events may yet be lost
        checkpoint = store.commit_whole(store.temporary_folder(self._checkpoints, snapshot.step), manifest)
        snapshot.mark_saved()
        self._log.write(
            "checkpoint_saved",
            step=snapshot.step,
            path=str(checkpoint),
            bytes=manifest.num_bytes,
            seconds=round(self._clock() - started, 6),
        )
        retention.prune(self._checkpoints, snapshot.step, self._policy)
        return True

    def _write(self, snapshot: Snapshot) -> None:
        """Write this machine's part, and see that the disk has what was in memory.

        Raises:
            OSError: the disk is full, or does not let us write.
            SaveFailed: it holds something else than was written.
        """
        temporary = store.temporary_folder(self._checkpoints, snapshot.step)
        temporary.mkdir(parents=True, exist_ok=True)
        manifest = read_manifest(snapshot.path)
        for name, expected in manifest.files.items():
            copy_durably(snapshot.path / name, temporary / name)
            if fingerprint_on_disk(temporary / name) != expected:
                raise store.SaveFailed(f"{temporary / name} reads back other than it was written")
        write_manifest(temporary, manifest, _part(self._machine.node))

    def _whole_manifest(self, own: Manifest) -> Manifest | None:
        """The manifest of all machines' files together, once all have written theirs."""
        temporary = store.temporary_folder(self._checkpoints, own.step)
        files: dict[str, list[Any]] = {}
        for node in range(self._machine.num_nodes):
            try:
                part = read_manifest(temporary, _part(node))
            except UserError:
                return None
            if replace(part, files={}) != replace(own, files={}):  # of an earlier attempt
                return None
            files |= part.files
        if own.num_files not in (None, len(files)):
            raise store.SaveFailed(f"the machines have written {len(files)} of {own.num_files} files")
        return replace(own, files=files)


def _part(node: int) -> str:
    return f"part-{node:05d}.{MANIFEST}"
