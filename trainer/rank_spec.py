"""What a rank is told. Apart from `trainer.rank`, so that the launcher can say it without importing torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Task = Literal["train", "evaluate", "logits", "answer"]


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
    """The resolved config, as `trainer.config_file.dump` writes it."""
    run_dir: Path
    task: Task = "train"
    threads: int = 1
    checkpoint: Path | None = None
    """What every task but `train` reads."""
    room: Path | None = None
    """Of this machine (`trainer.checkpoint.service.room`), where a checkpoint service is at work."""
    output: Path | None = None
    """Where they write their result."""
    requests: Path | None = None
    """What `answer` answers (`trainer.inference.requests`)."""
    stream: Path | None = None
    """Where rank 0 appends a line `REQUEST TOKEN`, a number and an id, for each token that is generated, as it is."""
    heartbeats: Path | None = None
    """A folder of this machine for signs of life (`trainer.heartbeat`), which is on a tmpfs, for its owner alone, and
    empty when the ranks start; None where nobody looks."""
