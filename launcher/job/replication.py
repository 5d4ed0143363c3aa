"""Snapshots travel between machines through Ray: to a neighbour's memory while training, and back before it goes on."""

import logging
import threading
from collections.abc import Sequence
from typing import Any

import ray

from launcher.placement import Placement
from trainer.checkpoint.service.replica import Fetch, Held, Holder, Holding, plan
from trainer.checkpoint.service.room import Room
from trainer.config import UserError

_LOOK_SECONDS = 0.5
"""Between looks for a new snapshot of the neighbour's."""
_log = logging.getLogger(__name__)


class SnapshotPeer:
    """A Ray actor, one per machine beside its agent: gives out what the machine holds, and copies its neighbour's."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._copying = threading.Lock()

    def settle(self, room: Room) -> None:
        """Before everything else in a life: what this machine holds lies there."""
        self._holder = Holder(room)

    def holdings(self) -> list[Holding]:
        return self._holder.holdings()

    def newest(self) -> Held | None:
        return self._holder.newest()

    def held(self, step: int, written_at: float | None) -> Held | None:
        return self._holder.held(step, written_at)

    def read(self, step: int, written_at: float | None, name: str, position: int) -> bytes:
        return self._holder.read(step, written_at, name, position)

    def was_copied(self, step: int, written_at: float | None) -> None:
        self._holder.was_copied(step, written_at)

    def fetch(self, peer: Any, step: int, written_at: float | None, files: tuple[str, ...]) -> None:
        """Bring files of another machine into this one's room."""
        self._holder.fetch(_OtherMachine(peer), step, written_at, files)

    def follow(self, neighbour: Any) -> None:
        """Keep a copy of the neighbour's newest snapshot, until `stop`."""
        source = _OtherMachine(neighbour)
        self._is_over.clear()
        while not self._is_over.wait(_LOOK_SECONDS):
            try:
                with self._copying:
                    if not self._is_over.is_set():
                        self._holder.follow(source)
            except (OSError, UserError, ray.exceptions.RayError) as error:  # a copy less; the next may succeed
                _log.warning("the neighbour's snapshot could not be copied: %s", error)

    def stop(self) -> None:
        """End `follow`, and give the copy's memory back where the run no longer needs any."""
        self._is_over.set()
        with self._copying:
            self._holder.tidy()


class _OtherMachine:
    """`trainer.checkpoint.service.replica.Source` over an actor."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer

    def newest(self) -> Held | None:
        found: Held | None = ray.get(self._peer.newest.remote())
        return found

    def held(self, step: int, written_at: float | None) -> Held | None:
        found: Held | None = ray.get(self._peer.held.remote(step, written_at))
        return found

    def read(self, step: int, written_at: float | None, name: str, position: int) -> bytes:
        try:
            content: bytes = ray.get(self._peer.read.remote(step, written_at, name, position))
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from error
        return content

    def was_copied(self, step: int, written_at: float | None) -> None:
        ray.get(self._peer.was_copied.remote(step, written_at))


def bring_together(peers: Sequence[Any], where: Placement) -> list[Fetch]:
    """Give every machine the newest snapshot of which nothing is lost; returns what was copied."""
    holdings = dict(enumerate(ray.get([peer.holdings.remote() for peer in peers])))
    fetches = plan(holdings, where.ranks_of)
    ray.get(
        [
            peers[each.to_node].fetch.remote(peers[each.from_node], each.step, each.written_at, each.files)
            for each in fetches
        ]
    )
    return fetches


def follow_neighbours(peers: Sequence[Any]) -> None:
    """Every machine keeps a copy of the snapshots of the one before it."""
    for node, peer in enumerate(peers):
        peer.follow.remote(peers[node - 1])
