"""How large the pods of a run must be: arithmetic on the config, in whole CPUs and GiB.

What a run holds is counted (`launcher.memory`); what processes take besides is an allowance. Those for CUDA are
estimates that no run has confirmed yet. A pod's memory includes what lies in its /dev/shm.
"""

from dataclasses import dataclass

from launcher import memory
from trainer import plan
from trainer.config import RunConfig

GIB = 2**30
OBJECT_STORE_BYTES = GIB
"""Of Ray, on every machine: descriptions of work pass through it, no data."""

_TRANSPORT_BYTES_PER_RANK = GIB // 4  # buffers of gloo or NCCL between processes of a machine
_MACHINE_BYTES = 3 * GIB  # Ray, the agent, the fork server with all imports, the checkpoint service
_CPU_RANK_BYTES = GIB
_CUDA_RANK_BYTES = 6 * GIB  # a CUDA context, NCCL, pinned buffers
_TASK_BYTES = GIB  # a worker that prepares data, one a CPU, before ranks are there
_DRIVER_BYTES = 4 * GIB  # Ray's head and the driver
_DRIVER_BYTES_PER_PARAMETER = 4  # the exported model in fp32, opened for the sample at the end
_HEAD_CPUS = 2


@dataclass(frozen=True)
class PodSize:
    """What a pod of the run needs."""

    cpus: int
    memory_bytes: int
    shared_memory_bytes: int
    gpus: int = 0


def machine(config: RunConfig, with_gpus: bool) -> PodSize:
    """A machine that ranks live on."""
    ranks = config.ranks_per_node
    cpus = ranks * (config.launch.threads_per_rank or 1) + 1  # one for the agent and the checkpoint service
    shared = OBJECT_STORE_BYTES + memory.snapshots_bytes(config) + ranks * _TRANSPORT_BYTES_PER_RANK
    besides = _CUDA_RANK_BYTES if with_gpus else _CPU_RANK_BYTES
    training = ranks * (besides + memory.rank_bytes(config, on_gpus=with_gpus))
    total = _MACHINE_BYTES + max(training, cpus * _TASK_BYTES) + _whole_gib(shared)
    return PodSize(cpus, _whole_gib(total), _whole_gib(shared), ranks if with_gpus else 0)


def head(config: RunConfig) -> PodSize:
    """The pod of the driver, on which no rank lives."""
    model = _DRIVER_BYTES_PER_PARAMETER * plan.num_parameters(config.model, padded=True)
    return PodSize(
        _HEAD_CPUS, _whole_gib(_DRIVER_BYTES + model + OBJECT_STORE_BYTES), _whole_gib(OBJECT_STORE_BYTES + GIB // 4)
    )


def quantity(num_bytes: int) -> str:
    """As Kubernetes writes it."""
    assert num_bytes % GIB == 0
    return f"{num_bytes // GIB}Gi"


def _whole_gib(num_bytes: int) -> int:
    return -(-num_bytes // GIB) * GIB
