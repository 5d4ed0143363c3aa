"""A rank of any layout without its memory and without the others: what it would allocate, built on the meta device.

The groups, the chunks and DeepSpeed's optimizer are those of a run. The process group is torch's fake one, which says
of every collective that it is done; tensors have shapes and no values.
"""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import device, parallel
from trainer.config import RunConfig
from trainer.engine.deepspeed_config import REDUCE_BUCKET_ELEMENTS
from trainer.engine.state import TrainingState
from trainer.engine.zero import Zero
from trainer.model.gpt import build_chunks

_BUCKET_BYTES = 4 * REDUCE_BUCKET_ELEMENTS
_Storages = dict[int, int]
"""Bytes by address."""


@dataclass(frozen=True)
class BuiltRank:
    """What one rank holds before its optimizer runs: `num_parameters`, and bytes of what follows."""

    rank: int
    stage: int
    tensor_rank: int
    replica: int
    """Its place among the ranks that ZeRO splits over."""
    num_parameters: int
    weights: int
    gradients: int
    """And, under offload of the optimizer, what is on its way."""
    optimizer: int


def prepare_process() -> None:
    """Once, in a process that does nothing else: it is as every rank in turn."""
    warnings.simplefilter("ignore")  # of calls that DeepSpeed makes in an old way
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks
    torch.set_num_threads(1)
    device.activate("cpu")


def build(config: RunConfig, rank: int) -> BuiltRank:
    """Be this rank up to its optimizer's first update. Needs `prepare_process`."""
    with _as_rank(config, rank):
        gc.collect()
        gc.freeze()  # what earlier ranks have left behind is not looked through, and not counted
        zero, num_parameters = _with_gradients(config)
        try:
            return measure(zero, num_parameters)
        finally:
            zero.optimizer.destroy()  # its hooks would keep all of it alive, out of sight of the garbage collector


def measure(zero: Zero, num_parameters: int) -> BuiltRank:
    """Every tensor that is alive and came after the last `gc.freeze`, by what it is for."""
    live = _live_storages()
    for shape_only in _leaves(getattr(zero.optimizer, "round_robin_bit16_meta", [])):
        live.pop(_address(shape_only), None)  # DeepSpeed notes shapes as meta tensors
    weights = _taken(live, _weights(zero))
    optimizer = _taken(live, _optimizer_state(zero))
    return BuiltRank(
        rank=dist.get_rank(),
        stage=parallel.pipeline_rank(),
        tensor_rank=parallel.tensor_rank(),
        replica=dist.get_rank(parallel.data_group()),
        num_parameters=num_parameters,
        weights=weights,
        gradients=sum(size for size in live.values() if size != _BUCKET_BYTES),  # the plan counts the bucket apart
        optimizer=optimizer,
    )


def _live_storages() -> _Storages:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


@contextmanager
def _as_rank(config: RunConfig, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.parallel.num_ranks)
    try:
        parallel.build_groups(config.parallel)
        yield
    finally:
        parallel.leave()


def _with_gradients(config: RunConfig) -> tuple[Zero, int]:
    """DeepSpeed around this rank's chunks, gradients of a step included, and how many weights it was given.

    ZeRO 3 has room for gradients from the start. Under the others each backward brings them, from a stand-in for the
    model that depends on all weights.
    """
    with _OnMeta():
        chunks = build_chunks(config)
        num_parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        for chunk in chunks:
            chunk.forward = partial(_sum_of_weights, chunk)
        zero = Zero(config, chunks, {})
        state = TrainingState(config, zero.optimizer, {})
        state.prepare(0)
        state.refresh_weights()
        if config.parallel.zero < 3:
            zero.begin_step()
            for index in reversed(range(len(chunks))):
                zero.forward(index).backward()
            zero.finalize_gradients()
    return zero, num_parameters


def _sum_of_weights(module: torch.nn.Module) -> Any:
    return sum(parameter.sum() for parameter in module.parameters())


def _weights(zero: Zero) -> Iterator[Tensor]:
    for parameter in zero.module.parameters():
        yield parameter
        if hasattr(parameter, "ds_tensor"):  # ZeRO 3's part of it
            yield parameter.ds_tensor


def _optimizer_state(zero: Zero) -> Iterator[Tensor]:
    """Master weights and what Adam remembers of them; ZeRO 3 beside them notes if a gradient was not finite."""
    adamw = zero.optimizer.optimizer
    for master, remembered in adamw.state.items():
        yield master
        yield from (each for each in remembered.values() if isinstance(each, Tensor))
    yield from (getattr(zero.optimizer, name) for name in ("inf_or_nan_tracker",) if hasattr(zero.optimizer, name))


def _taken(live: _Storages, tensors: Iterator[Tensor]) -> int:
    """Bytes of these among the live ones, which then are told of no more."""
    return sum(live.pop(_address(tensor), 0) for tensor in tensors)


def _address(tensor: Tensor) -> int:
    """Of the storage's record: on the meta device there is no other."""
    return int(tensor.untyped_storage()._cdata)


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    for branch in tree:
        yield from _leaves(branch)


class _OnMeta(TorchDispatchMode):
    """Whatever is asked of a device is done on the meta device, also in hooks of a backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype", args[0].dtype) == args[0].dtype:
                return torch.ops.aten.alias.default(args[0])  # on the rank's device it is there already
        return func(*args, **kwargs)
