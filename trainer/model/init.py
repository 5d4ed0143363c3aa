"""Initial weights that do not depend on the layout.

Each value is a function of (seed, name of the global tensor, index in it), so a rank draws just the boxes it owns and
every layout starts from the same model. Distribution as in GPT-2 (Radford et al. 2019, section 2.3): normal with
standard deviation `init_std`, residual projections divided by sqrt(2 x layers), biases zero, norm weights one.
"""

import hashlib
import math

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model.sharding import Box

_RESIDUAL_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_ELEMENTS_AT_ONCE = 1 << 22  # bounds the scratch memory of a draw
# splitmix64's constants (Steele, Lea, Flood 2014) as signed integers, which is what torch multiplies
_GOLDEN, _MIX_1, _MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def initial_values(box: Box, model: ModelConfig, seed: int) -> Tensor:
    """The box's initial values, fp32, of shape box.shape."""
    if box.key.endswith("bias"):
        return torch.zeros(box.shape)
    if "norm" in box.key:
        return torch.ones(box.shape)
    std = model.init_std
    if box.key.endswith(_RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * model.num_layers)
    return standard_normal(seed, box).mul_(std)


def standard_normal(seed: int, box: Box) -> Tensor:
    """Normal variates for a box of a global tensor, fp32, of shape box.shape; drawn some rows at a time."""
    stream = int.from_bytes(
        hashlib.blake2b(f"{seed}:{box.key}".encode(), digest_size=8).digest(), "little", signed=True
    )
    rows = torch.zeros(1, dtype=torch.int64)  # global flat index of the first element of each row
    for axis, (start, size) in enumerate(zip(box.offset[:-1], box.shape[:-1], strict=True)):
        stride = math.prod(box.global_shape[axis + 1 :])
        rows = (rows.unsqueeze(-1) + torch.arange(start, start + size) * stride).flatten()
    columns = torch.arange(box.offset[-1], box.offset[-1] + box.shape[-1])
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // columns.numel())
    slabs = [_normal_at(stream, some.unsqueeze(-1) + columns) for some in rows.split(rows_at_once)]
    return torch.cat(slabs).view(box.shape)


def _normal_at(stream: int, index: Tensor) -> Tensor:
    """Box-Muller over two 32-bit halves of a 64-bit hash of (stream, index)."""
    bits = _splitmix64(index * _GOLDEN + stream)
    high = ((bits >> 32) & 0xFFFFFFFF).double().add_(0.5).div_(2.0**32)
    low = (bits & 0xFFFFFFFF).double().add_(0.5).div_(2.0**32)
    return (high.log_().mul_(-2).sqrt_() * low.mul_(2 * math.pi).cos_()).float()


def _splitmix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap as unsigned ones do."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
