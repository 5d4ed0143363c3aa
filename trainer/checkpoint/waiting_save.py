"""Writing a whole checkpoint while training waits; `trainer.checkpoint.saver` lets it go on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint import sharded
from trainer.checkpoint.format import store
from trainer.checkpoint.format.chunk_file import file_name
from trainer.checkpoint.format.disk import fingerprint_on_disk, reason_of
from trainer.checkpoint.format.manifest import Manifest, fingerprint
from trainer.config import UserError
from trainer.engine.engine import Engine


def save(engine: Engine, checkpoints: Path, facts: Manifest) -> Manifest:
    """Write and commit the checkpoint of `facts.step`. Collective; on return it exists for every rank.

    Args:
        facts: all that the manifest says but the files and the number of updates.

    Raises:
        SaveFailed: on every rank, if one of them could not write.
    """
    temporary, problem = store.temporary_folder(checkpoints, facts.step), None
    if dist.get_rank() == 0:
        problem = _attempt(lambda: store.begin(checkpoints, facts.step))
    _agree(problem)
    mine: dict[str, list[Any]] = {}

    def write() -> None:
        path = temporary / file_name(dist.get_rank())
        sharded.write(engine, path)
        mine[path.name] = fingerprint(path, durable=True)
        if fingerprint_on_disk(path) != mine[path.name]:
            raise store.SaveFailed(f"{path} reads back other than it was written")

    _agree(_attempt(write))
    parts: list[dict[str, list[Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    files = {name: described for part in parts for name, described in part.items()}
    manifest = replace(facts, files=files, num_updates=engine.state.num_updates)
    if dist.get_rank() == 0:
        problem = _attempt(lambda: store.commit_whole(temporary, manifest))
    _agree(problem)
    return manifest


def _attempt(action: Any) -> str | None:
    """What went wrong."""
    try:
        action()
    except OSError as error:
        return reason_of(error)
    except (store.SaveFailed, UserError) as error:
        return str(error)
    return None


def _agree(problem: str | None) -> None:
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, each in enumerate(problems):
        if each:
            raise store.SaveFailed(f"{each} (rank {rank})")
