"""What a run takes of its machines' memory: arithmetic on the config."""

import math
from pathlib import PurePosixPath

from launcher.planning.cluster import load
from launcher.planning.rank_memory import fullest
from trainer import plan
from trainer.config import RunConfig

_STATE_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments: what a snapshot holds
_SNAPSHOTS = {"checkpoints": 2, "restarts too": 3}  # docs/checkpoints.md, "Snapshots for restarts"
_SHARED_MEMORY = PurePosixPath("/dev/shm")


def least_host_bytes(config: RunConfig) -> int:
    """Below which no machine with GPUs can do: the offloaded state of ranks on the fullest, and one snapshot."""
    held = [plan.state_bytes_per_rank(config, stage).host for stage in range(config.parallel.pipeline)]
    fullest_machine = max(sum(held[stage] for stage in stages) for stages in stages_of_machines(config))
    return fullest_machine + (snapshot_bytes(config) if _keeps_snapshots(config) else 0)


def stages_of_machines(config: RunConfig) -> list[list[int]]:
    """The pipeline stage of each rank, machine by machine: ranks are numbered stage by stage."""
    num_ranks, here = config.parallel.num_ranks, config.ranks_per_node
    stages = [rank * config.parallel.pipeline // num_ranks for rank in range(num_ranks)]
    return [stages[first : first + here] for first in range(0, num_ranks, here)]


def rank_bytes(config: RunConfig, *, on_gpus: bool) -> int:
    """What the fullest rank holds in the host's memory: on CPUs everything."""
    if on_gpus:
        return max(plan.state_bytes_per_rank(config, stage).host for stage in range(config.parallel.pipeline))
    return math.ceil(fullest(config, load("cpu")).memory.total)


def snapshots_bytes(config: RunConfig) -> int:
    """What a machine's snapshots take of its shared memory at most."""
    return room_bytes(config) if _keeps_snapshots(config) else 0


def room_bytes(config: RunConfig) -> int:
    """What a machine's snapshots take at most, wherever they lie, by the table of docs/checkpoints.md."""
    copies = _SNAPSHOTS["restarts too" if config.checkpoint.snapshot_every_steps else "checkpoints"]
    copies *= 2 if config.checkpoint.replicates(config.launch.nodes) else 1
    return copies * snapshot_bytes(config)


def snapshot_bytes(config: RunConfig) -> int:
    """One of them: a machine's share of a checkpoint."""
    return -(-checkpoint_bytes(config) // config.launch.nodes)


def checkpoint_bytes(config: RunConfig) -> int:
    return _STATE_BYTES_PER_PARAMETER * plan.num_parameters(config.model, padded=True)


def _keeps_snapshots(config: RunConfig) -> bool:
    folder = PurePosixPath(config.checkpoint.snapshots_in)
    return config.checkpoint.asynchronous and folder.is_relative_to(_SHARED_MEMORY)
