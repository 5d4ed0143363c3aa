"""The only place that knows CPU from CUDA.

megatron-core asks for `device="cuda"` in its schedules and layers. Where a run computes on the CPU, `activate` sends
those requests to the CPU, once per process and before any model is built. On CUDA nothing is changed.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.utils._device

from trainer.heartbeat import Memory

DeviceKind = Literal["cpu", "cuda"]

# torch functions that megatron-core calls with device="cuda" or pin_memory=True
_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "zeros_like",
    "ones_like",
    "empty_like",
    "randn",
    "rand",
)
_CPU = torch.device("cpu")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_seam_is_active = False


def resolve(wanted: Literal["auto", "cpu", "cuda"]) -> DeviceKind:
    """`auto` means CUDA where it exists. Asks the driver through NVML, so no CUDA context is made before a fork."""
    if wanted != "auto":
        return wanted
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return "cuda" if torch.cuda.is_available() else "cpu"


def num_gpus() -> int:
    """GPUs of this machine; makes no CUDA context, like `resolve`."""
    return torch.cuda.device_count() if resolve("auto") == "cuda" else 0


def activate(kind: DeviceKind, local_rank: int = 0) -> torch.device:
    """Make `kind` the device of this process and return it."""
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    _redirect_cuda_to_cpu()
    _keep_freed_memory()
    return _CPU


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given; so what comes next is not charged with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> Memory:
    """What this process holds now."""
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * _PAGE_BYTES
    if device.type != "cuda":
        return Memory(resident=resident)
    found = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return Memory(found["allocated_bytes.all.current"], found["reserved_bytes.all.current"], resident, total - free)


def name_of(device: torch.device) -> str:
    """Of its model, as the vendor calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def backend(kind: DeviceKind) -> str:
    """The torch.distributed backend that moves this device's tensors."""
    return "nccl" if kind == "cuda" else "gloo"


def _redirect_cuda_to_cpu() -> None:
    global _seam_is_active
    if _seam_is_active:
        return
    _seam_is_active = True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # megatron-core passes it as device=
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    # torch caches which functions `with torch.device(...)` acts on when first asked: let that be before we wrap them
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    from megatron.core.tensor_parallel import random as megatron_random

    stateful: Any = megatron_random
    stateful._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    stateful._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # it warns at every draw that the CPU's generator has moved, which here is the one to move
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Have glibc reuse large blocks. It would map each anew and the kernel clear it: some 10 % of a step's time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # constants of malloc.h
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return redirected
