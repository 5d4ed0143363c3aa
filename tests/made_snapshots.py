"""Snapshots of made-up tensors, as the ranks of one or more machines leave them for the checkpoint services."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from made_checkpoints import Arrays, file_content, spread
from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.manifest import MANIFEST, Manifest
from trainer.checkpoint.service.room import Request, Room, room_path
from trainer.checkpoint.service.saving import CheckpointService, Machine
from trainer.config import CheckpointConfig
from trainer.events import Event, EventLog, read_events

Bytes = dict[str, bytes]
"""What each rank's file holds."""


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """Where waiting for the disk costs nothing: for tests that save hundreds of times."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        yield Path(folder)


def tensors_of(step: int, attempt: float) -> Arrays:
    draw = np.random.default_rng([step, int(attempt)])
    shapes = {"a": (24, 70), "b": (33,), "c": (2, 3, 5)}
    return {
        f"{kind}/{key}": draw.standard_normal(shape, np.float32)
        for kind in ("master", "exp_avg")
        for key, shape in shapes.items()
    }


class World:
    """The rooms of a run's machines, one checkpoints folder, a clock that stands still, and what was recorded."""

    def __init__(self, folder: Path, num_nodes: int = 1, ranks_per_node: int = 2, **policy: Any) -> None:
        self.folder, self.checkpoints = folder, folder / "run" / "checkpoints"
        self.policy = CheckpointConfig(**policy)
        self.rooms = [
            Room(
                room_path(folder / "memory", folder / "run", "id", node),
                range(node * ranks_per_node, (node + 1) * ranks_per_node),
            )
            for node in range(num_nodes)
        ]
        self.now = 1000.0
        (folder / "run").mkdir(parents=True)
        self.log = EventLog(folder / "run" / "events.jsonl")

    @property
    def events(self) -> list[Event]:
        events = read_events(self.folder / "run" / "events.jsonl")
        return [{key: value for key, value in event.items() if key != "time"} for event in events]

    def service(self, node: int = 0) -> CheckpointService:
        """A new one, as one that was killed is replaced."""
        machine = Machine(node, len(self.rooms))
        return CheckpointService(
            self.rooms[node], self.checkpoints, self.policy, self.log.write, machine, lambda: self.now, self.log.sync
        )

    def kinds(self) -> list[tuple[str, int]]:
        return [(event["kind"], event["step"]) for event in self.events]

    def snapshot(
        self, step: int, *, durable: bool = True, attempt: float = 1.0, nodes: Sequence[int] | None = None
    ) -> Bytes:
        """All ranks, or those on `nodes`, leave a snapshot; returns what the whole checkpoint has to hold."""
        tensors, num_files = tensors_of(step, attempt), self.rooms[-1].ranks.stop
        chunks = spread(tensors, num_files)
        facts = Manifest(step, 16 * step, {}, num_updates=step, written_at=attempt, num_files=num_files)
        written: Bytes = {}
        for node, room in enumerate(self.rooms):
            for rank in room.ranks:
                written[file_name(rank)] = file_content(chunks[rank], tensors)
                if nodes is None or node in nodes:
                    room.begin_file(step, rank).write_bytes(written[file_name(rank)])
                    room.finish_file(step, rank)
            if nodes is None or node in nodes:
                room.request(step, Request(facts, durable))
        return written

    def is_busy(self) -> bool:
        """What the ranks ask before they begin a snapshot."""
        return any(room.is_busy() for room in self.rooms)

    def committed(self, step: int) -> Bytes:
        """The files of a checkpoint, which verifies and has no others."""
        checkpoint = self.checkpoints / store.folder_name(step)
        store.verify(checkpoint)
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        del files[MANIFEST]
        return files


def work_until_idle(*services: CheckpointService, passes: int = 50) -> None:
    for _ in range(passes):
        did_something = [service.work() for service in services]
        if not any(did_something):
            return
    raise AssertionError(f"still at work after {passes} passes")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
