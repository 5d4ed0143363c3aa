"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in fp32: bf16 loses the positions of long sequences.

Shapes: b batch, n heads, s sequence, d head size.
"""

from functools import lru_cache

import torch
from torch import Tensor


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn elements i and i + d / 2 at position p by the angle p / base^(2i / d). [s, b, n, d], dtype kept."""
    return turn(x, *cos_and_sin(x.shape[0], x.shape[3], base, x.device))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same by known angles, of which each is for elements i and i + d / 2. [s, b, n, d], dtype kept."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@lru_cache(maxsize=4)
def cos_and_sin(s: int, d: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the angles at positions 0 to s - 1, each [s, 1, 1, d / 2]."""
    frequencies = base ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)
    angles = torch.arange(s, dtype=torch.float64, device=device)[:, None, None, None] * frequencies
    return angles.cos().float(), angles.sin().float()
