"""The entry point of one rank: a process that the agent forks from its fork server.

This module is what the fork server preloads, so importing it must import all that a rank needs, initialise nothing
and start no thread.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Task = Literal["train", "evaluate"]


@dataclass(frozen=True)
class RankSpec:
    """All that a rank needs to know to join the others; travels by pickle."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str
    """Init method of torch.distributed: file:///path on one machine, tcp://host:port across machines."""
    config_yaml: str
    """The resolved config, as `trainer.config.dump` writes it."""
    run_dir: Path
    task: Task = "train"
    threads: int = 1


def main(spec: RankSpec) -> None:
    """Run the task of this rank to its end; an exception means that the rank failed."""
    os.environ.update(
        RANK=str(spec.rank),
        WORLD_SIZE=str(spec.world_size),
        LOCAL_RANK=str(spec.local_rank),
        LOCAL_WORLD_SIZE=str(spec.local_world_size),
    )
    raise NotImplementedError
