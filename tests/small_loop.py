"""Small runs of the training loop on gloo ranks, with checkpoint services beside them, as on one or more machines."""

import os
import select
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.shards import ShardWriter, TokenBatch
from ranks import run_on_ranks
from trainer import loop
from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.manifest import read_manifest, write_manifest
from trainer.checkpoint.service.presence import Presence
from trainer.checkpoint.service.room import Request, Room
from trainer.checkpoint.service.saving import CheckpointService, Machine
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.data.ledger.audit import audit
from trainer.events import Event, EventLog, read_events
from trainer.run_dir import RunDir

SEQ, VOCAB, NUM_STEPS, GLOBAL_BATCH = 16, 90, 7, 8
TOKENS_PER_STEP = SEQ * GLOBAL_BATCH

LAYOUTS: dict[str, dict[str, Any]] = {"DP2": {"data": 2, "zero": 2}, "TP2": {"tensor": 2}, "one rank": {}}


def prepare_data(folder: Path) -> Path:
    """Walks through the vocabulary: easy to learn, and 40 windows only, so that epochs end."""
    draw = np.random.default_rng(3)
    for name, num_windows in (("train", 40), ("heldout", 9)):
        tokens = np.cumsum(draw.choice([1, 1, 1, 2], num_windows * SEQ)) % (VOCAB - 1)
        with ShardWriter(folder / name, VOCAB, end_of_text_id=VOCAB - 1) as writer:
            writer.add(TokenBatch.of([tokens.astype(np.uint16)]))
            writer.finish()
            writer.commit()
    return folder


def config_of(data: Path, layout: str = "DP2", **checkpoint: Any) -> RunConfig:
    """Seven steps, of which the third, the sixth and the last are saved and the even ones and the last evaluated."""
    return from_tree(
        {
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": VOCAB, "seq_length": SEQ},
            "train": {
                "total_tokens": NUM_STEPS * TOKENS_PER_STEP,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": 4,
            },
            "optimizer": {"lr": 1e-2, "warmup_tokens": 2 * TOKENS_PER_STEP, "eps": 1e-5},
            "parallel": LAYOUTS[layout],
            "data": {"prepared": str(data)},
            "evaluation": {"every_steps": 2},
            "checkpoint": {"every_steps": 3, "keep_last": 9, **checkpoint},
        }
    )


def train(
    config: RunConfig,
    run_dir: RunDir,
    rooms: Sequence[Room] = (),
    on_event: Callable[[str, int | None], None] = lambda kind, step: None,
) -> list[Event]:
    """Run the loop on the config's ranks, which are spread over the machines of the rooms; returns this life's events.

    Args:
        on_event: is called on rank 0 with kind and step of every event, before it is written.
    """
    run_dir.create(config)
    before = len(read_events(run_dir.events_path))

    def rank(config: RunConfig, device: torch.device) -> None:
        log = EventLog(run_dir.events_path) if dist.get_rank() == 0 else None

        def record(kind: str, **fields: Any) -> None:
            if log is not None:
                on_event(kind, fields.get("step"))
                log.write(kind, **fields)

        room = next((room for room in rooms if dist.get_rank() in room.ranks), None)
        loop.train(config, run_dir, device, record, room)

    run_on_ranks(config, rank)
    assert audit(run_dir).findings == []
    return read_events(run_dir.events_path)[before:]


def die_at(step: int, rooms: Sequence[Room]) -> Callable[[str, int | None], None]:
    """Rank 0 is gone when it would record this step, and with it the others; before, it waits for the services."""

    def on_event(kind: str, at: int | None) -> None:
        if kind not in ("step", "checkpoint_snapshot"):  # at the latter, so that no rank finds it busy at the next one
            return
        while any(room.is_busy() for room in rooms):
            time.sleep(0.005)
        if (kind, at) == ("step", step):
            os._exit(9)

    return on_event


@contextmanager
def services(
    config: RunConfig, run_dir: RunDir, rooms: Sequence[Room], not_before: Path | None = None
) -> Iterator[None]:
    """A checkpoint service for each room, in processes of their own, which at the end save what is left.

    Args:
        not_before: does nothing until this file exists.
    """
    run_dir.create(config)
    ears, mouth = os.pipe()
    pids = []
    for node in range(len(rooms)):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.close(mouth)
            _serve(config, run_dir, rooms, node, ears, not_before)
    try:
        yield
    finally:
        os.close(mouth)
        os.close(ears)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes == [0] * len(pids)


def _serve(
    config: RunConfig, run_dir: RunDir, rooms: Sequence[Room], node: int, ears: int, not_before: Path | None
) -> None:
    """The whole life of a service; never returns into the parent's test."""
    try:
        log, machine = EventLog(run_dir.events_path), Machine(node, len(rooms))
        service = CheckpointService(rooms[node], run_dir.checkpoints, config.checkpoint, log.write, machine)
        is_over, presence = False, Presence(rooms[node])
        while not is_over or not service.is_idle():
            presence.show()
            may_work = not_before is None or not_before.exists()
            if not (may_work and service.work()):
                is_over = bool(select.select([ears], [], [], 0.01)[0])
        os._exit(0)
    finally:
        os._exit(1)


def as_snapshot(checkpoint: Path, room: Room, durable: bool = True) -> None:
    """Put a checkpoint's files into a room, as a snapshot that was hashed."""
    manifest = read_manifest(checkpoint)
    files = {file_name(rank): manifest.files[file_name(rank)] for rank in room.ranks}
    for rank in room.ranks:
        path = room.begin_file(manifest.step, rank)
        shutil.copyfile(checkpoint / path.name.removesuffix(".part"), path)
        room.finish_file(manifest.step, rank)
    room.request(manifest.step, Request(manifest, durable))
    write_manifest(room.path / store.folder_name(manifest.step), replace(manifest, files=files))


def of_kind(events: Sequence[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event["kind"] in kinds]


def results(events: Sequence[Event]) -> dict[tuple[str, int], Event]:
    """What a run computed, of the events in order: what differs from one life to the next left out."""
    passing = ("time", "seconds", "phases")
    return {
        (event["kind"], event["step"]): {key: value for key, value in event.items() if key not in passing}
        for event in of_kind(events, "step", "evaluated")
    }
