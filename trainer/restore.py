"""Where a run goes on: the newest checkpoint or snapshot that all ranks can use, or another run's, or the seed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from trainer import parallel
from trainer.checkpoint import sharded
from trainer.checkpoint.format import compatibility, store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.manifest import read_manifest
from trainer.checkpoint.service.room import Room
from trainer.config import RunConfig, UserError
from trainer.data.digest import from_hex
from trainer.data.prepared import fingerprints
from trainer.engine.engine import Engine
from trainer.run_dir import RunDir
from trainer.stability import StabilityState

Record = Callable[..., None]
Tier = Literal["memory", "disk"]


@dataclass(frozen=True)
class Progress:
    """How far a run is; with the engine's state, all that the next step depends on."""

    step: int = 0
    """Steps done."""
    stability: StabilityState = StabilityState()  # noqa: RUF009
    data_digest: int = 0
    """Of all samples that were computed on so far; see `trainer.data.digest`."""


@dataclass(frozen=True)
class Source:
    """What a run goes on from."""

    path: Path | None
    """None for the seed."""
    tier: Tier
    is_own: bool
    """Whether it is of this run."""
    weights_only: bool = False

    @property
    def shown(self) -> str | None:
        return str(self.path) if self.path else None


def restore(
    engine: Engine, config: RunConfig, run_dir: RunDir, room: Room | None, record: Record
) -> tuple[Source, Progress]:
    """Fill the engine from wherever the run goes on. Collective; no save may be under way.

    In this order: the newest snapshot or checkpoint of the run, `checkpoint.resume_from`, `checkpoint.weights_from`,
    the seed.

    Raises:
        UserError: the run's data is not what it trained on, or it cannot start from what the config names.
    """
    source = _find_own(config, run_dir, room, record) or _find_given(config, run_dir, record)
    progress = _load(engine, source)
    if room is not None and dist.get_rank() == room.ranks.start:
        room.void_after(progress.step if source.is_own else -1)
    parallel.sum_over_ranks(0)  # nobody begins a snapshot while those are being removed
    return source, progress


def _load(engine: Engine, source: Source) -> Progress:
    if source.path is None:
        engine.state.reset()
        return Progress()
    with store.being_read(source.path):  # another run, whose checkpoint it may be, prunes meanwhile
        if source.weights_only:
            sharded.load_initial_weights(engine, source.path)
            return Progress()
        manifest = sharded.load(engine, source.path)
    digest = from_hex(manifest.data_digest) if manifest.data_digest else 0
    return Progress(manifest.step, StabilityState.from_tree(manifest.stability), digest)


# ------------------------------------------------------------------------------------------------- this run's own state


def _find_own(config: RunConfig, run_dir: RunDir, room: Room | None, record: Record) -> Source | None:
    """The newest that verifies, in memory before on disk."""
    data = fingerprints(config, run_dir.data_for(config))
    for step, tier in _candidates(config, run_dir, room):
        folder = room.path if room is not None and tier == "memory" else run_dir.checkpoints
        path = folder / store.folder_name(step)
        problem = _agree(lambda path=path, tier=tier: _check(path, tier, config))  # type: ignore[misc]
        if problem:
            record("checkpoint_rejected", reason=f"{problem}; trying the one before")
            continue
        _raise_together(
            lambda path=path: compatibility.check_same_data(  # type: ignore[misc]
                read_manifest(path), data, run_dir.data_for(config), path
            )
        )
        return Source(path, tier, is_own=True)
    return None


def _candidates(config: RunConfig, run_dir: RunDir, room: Room | None) -> list[tuple[int, Tier]]:
    """(step, tier), newest first; those in memory that every rank has, and those on disk that rank 0 sees."""
    mine = {"memory": _restartable(config, room), "disk": store.steps(run_dir.checkpoints)}
    seen: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(seen, mine)
    in_memory = set.intersection(*(set(each["memory"].items()) for each in seen))
    found: list[tuple[int, Tier]] = [(step, "memory") for step, _ in in_memory]
    found += [(step, "disk") for step in seen[0]["disk"]]
    return sorted(found, key=lambda each: (each[0], each[1] == "memory"), reverse=True)


def _restartable(config: RunConfig, room: Room | None) -> dict[int, float | None]:
    """Steps of the snapshots that hold this rank's own state, with the time of each.

    Only the layout that wrote a snapshot can go on from it: a machine has no more than its own ranks' files.
    """
    if room is None:
        return {}
    layout, found = config.parallel.model_dump(mode="json"), {}
    for snapshot in room.restartable():
        try:
            manifest = read_manifest(snapshot.path)
        except UserError:
            continue
        if manifest.config["parallel"] == layout and file_name(dist.get_rank()) in manifest.files:
            found[snapshot.step] = manifest.written_at
    return found


def _check(path: Path, tier: Tier, config: RunConfig) -> None:
    """Check this rank's part of a candidate: in memory its own file, on disk every n-th.

    Raises:
        UserError: it is damaged.
    """
    manifest = store.read(path, part=tier == "memory")
    names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
    if config.checkpoint.verify:
        store.verify(path, [file_name(dist.get_rank())] if tier == "memory" else names)


# -------------------------------------------------------------------------------------------------- what it starts from


def _find_given(config: RunConfig, run_dir: RunDir, record: Record) -> Source:
    """What the config names, else the seed.

    Raises:
        UserError: it cannot be used.
    """
    wanted = config.checkpoint.resume_from or config.checkpoint.weights_from
    if not wanted:
        return Source(None, "disk", is_own=False)
    data = fingerprints(config, run_dir.data_for(config))
    named = [store.named(Path(wanted)) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(named, src=0)
    problem = f"{wanted} is no checkpoint and holds none"
    for path in named[0]:
        damage = _agree(lambda path=path: _check(path, "disk", config))  # type: ignore[misc]
        if damage is None:
            _raise_together(lambda path=path: compatibility.check_start(read_manifest(path), config, data, path))  # type: ignore[misc]
            return Source(path, "disk", is_own=False, weights_only=config.checkpoint.resume_from is None)
        record("checkpoint_rejected", reason=damage)
        problem = damage
    raise UserError(problem)


def _agree(check: Callable[[], None]) -> str | None:
    """The first problem that any rank has."""
    problem = None
    try:
        check()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((each for each in problems if each), None)


def _raise_together(check: Callable[[], None]) -> None:
    problem = _agree(check)
    if problem:
        raise UserError(problem)
