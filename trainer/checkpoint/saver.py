"""A rank's side of saving: snapshot into the room and go on, or write and wait where there is no room."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from trainer import parallel
from trainer.checkpoint import sharded, waiting_save
from trainer.checkpoint.format import retention, store
from trainer.checkpoint.format.disk import reason_of
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.service.presence import is_served
from trainer.checkpoint.service.room import Request, Room
from trainer.config import CheckpointConfig
from trainer.engine.engine import Engine

Record = Callable[..., None]
"""Appends an event of a kind with its fields; does nothing on ranks that do not write events."""

_POLL_SECONDS = 0.01
_GRACE_SECONDS = 15.0
"""For a checkpoint service that died to be replaced, which takes a second, or some on a machine that is overloaded."""
_BUSY = "the one before is still being written"
_COPYING = "the one before has no copy on another machine yet"
_ABANDONED = f"no checkpoint service has been alive on some machine for {_GRACE_SECONDS:g} s"


@dataclass(frozen=True)
class _Moment:
    """When all ranks know the same about the saves before."""

    unix_seconds: float
    """Of rank 0."""
    hindrance: str | None = None
    """Why no snapshot may begin."""
    is_abandoned: bool = False
    """Whether nobody is there who would save one."""
    waited_seconds: float = 0.0
    """Until the saves before had ended; zero if they had."""


class Saver:
    """Saves the training state of one run; every method is collective."""

    def __init__(self, engine: Engine, checkpoints: Path, room: Room | None, record: Record) -> None:
        """`room` is that of a machine with a checkpoint service; without one, training waits for the disk."""
        self._engine, self._checkpoints, self._room, self._record = engine, checkpoints, room, record
        self._policy: CheckpointConfig = engine.config.checkpoint
        self._unserved_since: float | None = None  # when this machine's service was first missed

    def save(self, facts: Manifest, *, durable: bool = True, must: bool = False) -> float | None:
        """Save the state as it is now; returns for how many seconds that held training up, or None if it was not saved.

        Args:
            facts: all that the manifest says but the files, the number of updates and the time.
            durable: as a checkpoint; else as a snapshot from which only a restart on these machines can go on.
            must: wait for a save that is still under way, whatever the policy says.
        """
        started = time.perf_counter()
        facts = replace(facts, num_updates=self._engine.state.num_updates, num_files=dist.get_world_size())
        if self._room is None:
            return self._save_and_wait(facts, started) if durable else None
        wait = must or (durable and self._policy.when_busy == "wait")
        moment = self._wait_for_services(self._room, wait, for_restarts=not durable)
        if moment.waited_seconds:
            self._record("checkpoint_waited", step=facts.step, seconds=round(moment.waited_seconds, 6))
        if moment.hindrance or (moment.is_abandoned and not durable):
            reason = moment.hindrance or _ABANDONED
            self._record("checkpoint_skipped", step=facts.step, durable=durable, reason=reason)
            return None
        problem: str | None = _ABANDONED
        if not moment.is_abandoned:
            problem = self._snapshot(self._room, Request(replace(facts, written_at=moment.unix_seconds), durable))
        if problem:
            self._record("checkpoint_failed", step=facts.step, reason=problem)
            return self._save_without(self._room, facts, started) if durable else None
        seconds = time.perf_counter() - started
        self._record("checkpoint_snapshot", step=facts.step, durable=durable, seconds=round(seconds, 6))
        return seconds

    def take_over(self) -> None:
        """At the beginning of a life: give up what the life before left, and the services cannot finish.

        Some machines may have a snapshot whole and wait for others that do not, and never will.
        """
        room = self._room
        if room is None:
            return
        if self._speaks_for_machine(room):
            room.clear_unfinished()
        dist.barrier()
        mine = {snapshot.step for snapshot in room.snapshots()}
        everywhere: list[set[int]] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, mine)
        if self._speaks_for_machine(room):
            for snapshot in room.snapshots():
                if snapshot.step not in set.intersection(*everywhere) and snapshot.is_pending():
                    room.retire(snapshot)
        dist.barrier()

    def finish(self) -> None:
        """Wait until every save that is under way has come to its end, or nobody is there who could end it."""
        if self._room is not None:
            self._wait_for_services(self._room, wait=True)

    def _wait_for_services(self, room: Room, wait: bool, for_restarts: bool = False) -> "_Moment":
        """Return when no save is under way, or, where that is not waited for, at once.

        All ranks ask again and again together: one that waited alone would let the others run into a timeout.

        Args:
            for_restarts: what is to begin is a snapshot for restarts, before which the last one must have its copies.
        """
        began: float | None = None  # to wait
        while True:
            is_copying = for_restarts and room.is_copying()
            now = time.time_ns() if dist.get_rank() == 0 else 0
            num_busy, num_copying, num_abandoned, nanoseconds = parallel.sum_over_ranks(
                int(room.is_busy()), int(is_copying), int(self._is_abandoned(room)), now
            )
            if num_abandoned or not (num_busy or num_copying):
                waited_seconds = 0.0 if began is None else time.perf_counter() - began
                return _Moment(nanoseconds / 1e9, is_abandoned=num_abandoned > 0, waited_seconds=waited_seconds)
            if not wait:
                return _Moment(nanoseconds / 1e9, hindrance=_BUSY if num_busy else _COPYING)
            began = time.perf_counter() if began is None else began
            time.sleep(_POLL_SECONDS)

    def _is_abandoned(self, room: Room) -> bool:
        """Whether this machine's service has died, and for so long that no other will take its place soon."""
        if not self._speaks_for_machine(room):
            return False
        if is_served(room):
            self._unserved_since = None
            return False
        now = time.monotonic()
        self._unserved_since = now if self._unserved_since is None else self._unserved_since
        return now - self._unserved_since > _GRACE_SECONDS

    def _snapshot(self, room: Room, request: Request) -> str | None:
        """Write all ranks' snapshots, or none; returns what went wrong."""
        step, rank, problem = request.facts.step, dist.get_rank(), None
        try:
            sharded.write(self._engine, room.begin_file(step, rank))
            room.finish_file(step, rank)
        except OSError as error:
            problem = f"no snapshot in shared memory: {reason_of(error)}"
        return self._agree_on(room, request, problem)

    def _agree_on(self, room: Room, request: Request, problem: str | None) -> str | None:
        """Make of what the ranks have written a snapshot, on all machines or on none."""
        (num_failed,) = parallel.sum_over_ranks(int(problem is not None))
        if self._speaks_for_machine(room) and not num_failed:
            try:
                room.request(request.facts.step, request)
            except OSError as error:
                problem = f"no snapshot in shared memory: {reason_of(error)}"
        (num_failed,) = parallel.sum_over_ranks(int(problem is not None))
        if num_failed and self._speaks_for_machine(room):
            room.drop(request.facts.step)
        others = f"no snapshot in shared memory: {num_failed} of {dist.get_world_size()} ranks could not write theirs"
        return problem or (others if num_failed else None)

    def _speaks_for_machine(self, room: Room) -> bool:
        return dist.get_rank() == room.ranks.start

    def _save_without(self, room: Room, facts: Manifest, started: float) -> float | None:
        """Save without the services, after which nothing older is to be saved any more."""
        seconds = self._save_and_wait(facts, started)
        if seconds is not None and self._speaks_for_machine(room):
            for snapshot in room.snapshots():
                if snapshot.is_pending():
                    room.retire(snapshot)
        return seconds

    def _save_and_wait(self, facts: Manifest, started: float) -> float | None:
        try:
            manifest = waiting_save.save(
                self._engine, self._checkpoints, replace(facts, written_at=round(time.time(), 3))
            )
        except store.SaveFailed as error:
            self._record("checkpoint_failed", step=facts.step, reason=str(error))
            return None
        seconds = time.perf_counter() - started
        self._record(
            "checkpoint_saved",
            step=facts.step,
            path=str(self._checkpoints / store.folder_name(facts.step)),
            bytes=manifest.num_bytes,
            seconds=round(seconds, 6),
        )
        if dist.get_rank() == 0:
            retention.prune(self._checkpoints, facts.step, self._policy)
        return seconds
