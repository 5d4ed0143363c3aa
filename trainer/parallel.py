"""Process groups and this rank's place in them, from the config. megatron-core's `parallel_state` holds the groups."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mcore
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from trainer.config import ParallelConfig
from trainer.device import DeviceKind, backend

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_HALF = 1 << 32  # of 64 bits

_T = TypeVar("_T")


def initialize(parallel: ParallelConfig, device: DeviceKind, init_method: str, rank: int, world_size: int) -> None:
    """Join the job's process group and build its subgroups. Order of ranks: tp, cp, dp, pp."""
    assert world_size == parallel.num_ranks, f"{world_size} ranks for a layout of {parallel.num_ranks}"
    dist.init_process_group(
        backend(device), init_method=init_method, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    build_groups(parallel)


def build_groups(parallel: ParallelConfig) -> None:
    """Build the groups over an existing process group."""
    mcore.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,  # beside those of the job's own backend
    )
    model_parallel_cuda_manual_seed(0)  # megatron-core needs its streams registered before a model is built


def leave() -> None:
    """Take groups and process group down, so that this process may join another."""
    mcore.destroy_model_parallel()
    dist.destroy_process_group()


def tell_waits(waited: Callable[[float], None]) -> None:
    """From now on tell how many seconds this process has waited for other ranks, each time it has.

    Every collective and every receive ends in `Work.wait`, whichever library began it. On gloo that lasts until the
    data is there; on NCCL it only puts a wait into the GPU's queue, and what is told is next to nothing.
    """
    wait = dist.Work.wait

    def timed_wait(work: dist.Work, *args: Any, **kwargs: Any) -> bool:
        began = time.perf_counter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            waited(time.perf_counter() - began)

    dist.Work.wait = timed_wait  # type: ignore[method-assign, assignment]


def seed_dropout(seed: int, step: int) -> None:
    """Restart the random streams of this rank as a function of (seed, step, place in the layout).

    No stream carries state from one step to the next, so a resumed run needs none restored. Tensor-parallel ranks
    share the default stream (residual dropout acts on replicated activations) and differ in the model-parallel one.
    """
    replica = mcore.get_data_parallel_rank(with_context_parallel=True)
    place = mcore.get_pipeline_model_parallel_rank() + mcore.get_pipeline_model_parallel_world_size() * replica
    model_parallel_cuda_manual_seed(dropout_seed(seed, step, place))


def dropout_seed(seed: int, step: int, place: int) -> int:
    """The default stream's seed; megatron-core adds 2718 + tp_rank to it for the model-parallel stream.

    31 bits, since torch's CPU generator reads no more than 32. The strides keep all those sums apart: places lie
    further from each other than any sum reaches, and steps are spread by the golden ratio.
    """
    return (seed * 1_000_003 + step * 1_327_217_885 + place * 8_191) % 2**31


def sum_over_ranks(*values: int) -> list[int]:
    """Sums over all ranks mod 2^64 of numbers from 0 to 2^64 - 1; the same answer on every rank."""
    halves = [half for value in values for half in divmod(value, _HALF)]  # whose sums stay far from overflowing
    device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(halves, dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    upper_and_lower = sums.view(-1, 2).tolist()
    return [(upper * _HALF + lower) % _HALF**2 for upper, lower in upper_and_lower]


def gather(mine: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every rank's tensor of this shape, in order of rank."""
    mine = mine.contiguous()
    tensors = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(tensors, mine, group=group)
    return tensors


def gather_objects(mine: _T, group: dist.ProcessGroup) -> list[_T]:
    """Every rank's, in order of rank."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def speaks_for_replica() -> bool:
    """Whether this is the one rank of its data-parallel replica that counts where all its ranks know the same."""
    return not (tensor_rank() or context_rank() or mcore.get_pipeline_model_parallel_rank())


def data_rank() -> int:
    return mcore.get_data_parallel_rank()


def data_size() -> int:
    return mcore.get_data_parallel_world_size()


def tensor_rank() -> int:
    return mcore.get_tensor_model_parallel_rank()


def tensor_size() -> int:
    return mcore.get_tensor_model_parallel_world_size()


def tensor_group() -> dist.ProcessGroup:
    return mcore.get_tensor_model_parallel_group()


def context_rank() -> int:
    return mcore.get_context_parallel_rank()


def context_size() -> int:
    return mcore.get_context_parallel_world_size()


def context_group() -> dist.ProcessGroup:
    return mcore.get_context_parallel_group()


def data_group() -> dist.ProcessGroup:
    """All ranks that hold the same weights: data and context parallel together."""
    return mcore.get_data_parallel_group(with_context_parallel=True)


def model_group() -> dist.ProcessGroup:
    """The ranks that hold one replica of the weights: tensor and pipeline parallel together."""
    return mcore.get_model_parallel_group()


def model_size() -> int:
    return tensor_size() * pipeline_size()


def from_last_stage(choice: torch.Tensor) -> torch.Tensor:
    """What the last pipeline stage has in a tensor, on all tensor and pipeline ranks of the replica; in place."""
    if model_size() > 1:
        dist.broadcast(choice, src=last_stage_rank() - tensor_rank(), group=model_group())
    return choice


def from_first_replica(choice: torch.Tensor) -> torch.Tensor:
    """What the first data-parallel replica has in a tensor, on all of them; in place."""
    dist.broadcast(choice, src=dist.get_global_rank(data_group(), 0), group=data_group())
    return choice


def embedding_group() -> dist.ProcessGroup | None:
    """The first and last pipeline stages, which hold copies of a tied embedding; None on other ranks."""
    return mcore.get_embedding_group() if mcore.is_rank_in_embedding_group() else None


def pipeline_group() -> dist.ProcessGroup:
    return mcore.get_pipeline_model_parallel_group()


def pipeline_rank() -> int:
    return mcore.get_pipeline_model_parallel_rank()


def pipeline_size() -> int:
    return mcore.get_pipeline_model_parallel_world_size()


def last_stage_rank() -> int:
    """Global rank of the last pipeline stage of this rank's pipeline."""
    return mcore.get_pipeline_model_parallel_last_rank()


def previous_stage_rank() -> int:
    """Global rank of the stage that gives to this one."""
    return mcore.get_pipeline_model_parallel_prev_rank()


def next_stage_rank() -> int:
    return mcore.get_pipeline_model_parallel_next_rank()


def is_first_stage(virtual_stage: int | None) -> bool:
    return mcore.is_pipeline_first_stage(ignore_virtual=virtual_stage is None, vp_stage=virtual_stage)


def is_last_stage(virtual_stage: int | None) -> bool:
    return mcore.is_pipeline_last_stage(ignore_virtual=virtual_stage is None, vp_stage=virtual_stage)


class DeepSpeedTopology:
    """What DeepSpeed asks of its `mpu`: tensor and pipeline ranks together are its one model-parallel axis."""

    def get_model_parallel_world_size(self) -> int:
        return tensor_size() * pipeline_size()

    def get_model_parallel_rank(self) -> int:
        return mcore.get_pipeline_model_parallel_rank() * tensor_size() + tensor_rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return mcore.get_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        return tensor_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return tensor_size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return tensor_group()

    def get_data_parallel_rank(self) -> int:
        return mcore.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return mcore.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return data_group()
