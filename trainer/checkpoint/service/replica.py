"""Snapshots of one machine kept in the memory of another, for when the machine is lost.

Every machine keeps a copy of its neighbour's newest snapshot beside its own room. When a run starts again, it is seen
which snapshot is the newest of which every rank's file is still held somewhere, and machines fetch what they lack.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.manifest import Manifest, write_manifest
from trainer.checkpoint.service.room import Request, Room, Snapshot

PIECE_BYTES = 32 << 20
_REPLICA = "replica"


@dataclass(frozen=True)
class Holding:
    """Files of one snapshot that a machine has."""

    step: int
    written_at: float | None
    """Tells snapshots of the same step, of different lives of the run, apart."""
    files: tuple[str, ...]


@dataclass(frozen=True)
class Fetch:
    """A copy to be made."""

    to_node: int
    from_node: int
    step: int
    written_at: float | None
    files: tuple[str, ...]


@dataclass(frozen=True)
class Held:
    """What a machine has of a snapshot."""

    manifest: Manifest
    """Of the files that are there."""
    durable: bool
    """Whether it is to become a checkpoint, if it is not one already."""

    def is_of(self, step: int, written_at: float | None) -> bool:
        return (self.manifest.step, self.manifest.written_at) == (step, written_at)


class Source(Protocol):
    """Another machine, as far as copying needs it."""

    def newest(self) -> Held | None:
        """The newest snapshot in its own room."""

    def held(self, step: int, written_at: float | None) -> Held | None:
        """What it has of a snapshot, in its own room and as a replica."""

    def read(self, step: int, written_at: float | None, name: str, position: int) -> bytes:
        """At most PIECE_BYTES of that snapshot's file from `position` on; nothing at the end."""

    def was_copied(self, step: int, written_at: float | None) -> None:
        """Its snapshot is safe elsewhere."""


class Holder:
    """What one machine holds: the snapshots in its own room, and the replica of its neighbour's."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._replicas = room.path / _REPLICA

    def newest(self) -> Held | None:
        newest = list(self._room.restartable())[-1:]
        return _held_in(newest[0].path) if newest else None

    def held(self, step: int, written_at: float | None) -> Held | None:
        found = [held for _, held in self._places(step, written_at)]
        if not found:
            return None
        files = {name: facts for each in reversed(found) for name, facts in each.manifest.files.items()}
        return replace(found[0], manifest=replace(found[0].manifest, files=files))

    def read(self, step: int, written_at: float | None, name: str, position: int) -> bytes:
        for folder, held in self._places(step, written_at):
            if name in held.manifest.files:
                with open(folder / name, "rb") as file:
                    file.seek(position)
                    return file.read(PIECE_BYTES)
        raise FileNotFoundError(f"{name} of step {step} is gone")

    def _places(self, step: int, written_at: float | None) -> Iterator[tuple[Path, Held]]:
        for place in (self._room.path, self._replicas):
            folder = place / store.folder_name(step)
            held = _held_in(folder)
            if held is not None and held.is_of(step, written_at):
                yield folder, held

    def was_copied(self, step: int, written_at: float | None) -> None:
        for snapshot in self._room.restartable():
            manifest = snapshot.manifest()
            if manifest is not None and (manifest.step, manifest.written_at) == (step, written_at):
                snapshot.mark_copied(manifest)

    def holdings(self) -> list[Holding]:
        """Of its own room and of its neighbour's."""
        folders = [each.path for each in self._room.restartable()]
        folders += [self._replicas / store.folder_name(step) for step in store.steps(self._replicas)]
        manifests = [each.manifest for each in map(_held_in, folders) if each is not None]
        return [Holding(each.step, each.written_at, tuple(each.files)) for each in manifests]

    def follow(self, neighbour: Source) -> bool:
        """Copy the neighbour's newest snapshot, if that is another than the one held; returns whether it was.

        Raises:
            OSError: the memory is full.
            UserError: what came is not what the neighbour has vouched for.
        """
        newest = neighbour.newest()
        if newest is None:
            return False
        manifest = newest.manifest
        replica = self._replicas / store.folder_name(manifest.step)
        held = _held_in(replica)
        if held is not None and held.is_of(manifest.step, manifest.written_at):
            return False
        self._room.make()
        temporary = store.begin(self._replicas, manifest.step)
        if not _copy(neighbour, manifest, tuple(manifest.files), temporary):
            return False
        store.commit(temporary, manifest)
        _write_request(replica, newest)
        neighbour.was_copied(manifest.step, manifest.written_at)
        for step in store.steps(self._replicas):
            if step != manifest.step:
                store.remove(self._replicas / store.folder_name(step))
        return True

    def fetch(self, source: Source, step: int, written_at: float | None, names: tuple[str, ...]) -> None:
        """Bring files into the own room, so that its ranks can go on from the snapshot.

        Raises:
            UserError: what came is not what the source has vouched for.
        """
        found = source.held(step, written_at)
        if found is None or not set(names) <= found.manifest.files.keys():
            return
        self._room.make()
        temporary = store.begin(self._room.path, step)
        if not _copy(source, found.manifest, names, temporary):
            return
        files = {name: found.manifest.files[name] for name in names}
        files |= self._link_own(found.manifest, temporary)
        store.commit(temporary, replace(found.manifest, files=files))
        _write_request(self._room.path / store.folder_name(step), found)

    def _link_own(self, manifest: Manifest, temporary: Path) -> dict[str, list[Any]]:
        """Keep what the room has of the snapshot already: other machines may be fetching it from here."""
        folder = self._room.path / store.folder_name(manifest.step)
        held = _held_in(folder)
        if held is None or not held.is_of(manifest.step, manifest.written_at):
            return {}
        linked = {name: facts for name, facts in held.manifest.files.items() if not (temporary / name).exists()}
        for name in linked:
            os.link(folder / name, temporary / name)
        return linked

    def tidy(self) -> None:
        """Remove the copy if this machine's own room has been given up: the run has ended well."""
        if not self._room.snapshots():
            self._room.remove()


def _copy(source: Source, manifest: Manifest, names: tuple[str, ...], folder: Path) -> bool:
    """Copy files and check them; False if the source has let go of them meanwhile."""
    for name in names:
        try:
            with open(folder / name, "wb") as file:
                while piece := source.read(manifest.step, manifest.written_at, name, file.tell()):
                    file.write(piece)
        except FileNotFoundError:
            shutil.rmtree(folder)
            return False
    write_manifest(folder, replace(manifest, files={name: manifest.files[name] for name in names}))
    store.verify(folder, names)
    return True


def _held_in(folder: Path) -> Held | None:
    """What lies in a folder that is a snapshot or a replica of one, and says what is to become of it."""
    step = store.step_of(folder.name)
    assert step is not None
    snapshot = Snapshot(folder, step, range(0))
    request, manifest = snapshot.request(), snapshot.manifest()
    return Held(manifest, request.durable) if request is not None and manifest is not None else None


def _write_request(folder: Path, held: Held) -> None:
    """Last: without it there is neither a snapshot nor a replica."""
    step = held.manifest.step
    Snapshot(folder, step, range(0)).write_request(Request(replace(held.manifest, files={}), held.durable))


def plan(holdings: Mapping[int, Sequence[Holding]], ranks_of: Callable[[int], range]) -> list[Fetch]:
    """What must be copied so that every machine has the newest snapshot of which nothing is lost.

    Args:
        holdings: of every machine of the run, by its number.
        ranks_of: the ranks that each is to run.
    """
    wanted = {node: {file_name(rank) for rank in ranks_of(node)} for node in holdings}
    everything = set().union(*wanted.values())
    snapshots = {(each.step, each.written_at) for held in holdings.values() for each in held}
    for snapshot in sorted(snapshots, key=lambda each: (each[0], each[1] or 0.0), reverse=True):
        places = _places(holdings, snapshot)
        if everything <= places.keys():
            return [fetch for node in holdings for fetch in _lacking(node, wanted[node], places, *snapshot)]
    return []


def _places(holdings: Mapping[int, Sequence[Holding]], snapshot: tuple[int, float | None]) -> dict[str, set[int]]:
    """File -> the machines that hold it."""
    places: dict[str, set[int]] = {}
    for node, held in holdings.items():
        for each in held:
            if (each.step, each.written_at) == snapshot:
                for name in each.files:
                    places.setdefault(name, set()).add(node)
    return places


def _lacking(
    node: int, wanted: set[str], places: Mapping[str, set[int]], step: int, written_at: float | None
) -> list[Fetch]:
    """What a machine must fetch, from as few machines as there are."""
    lacking: dict[int, list[str]] = {}
    for name in sorted(wanted):
        if node not in places[name]:
            lacking.setdefault(min(places[name]), []).append(name)
    return [Fetch(node, holder, step, written_at, tuple(names)) for holder, names in lacking.items()]
