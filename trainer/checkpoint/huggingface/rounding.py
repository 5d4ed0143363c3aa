"""Weights that their class holds divided by a constant, there and back without losing a bit.

GPT-Neo's queries are ours divided by c = sqrt(d), d the size of a head. Where c is no power of 2, fp32 has no number of
theirs for each of ours: with m in (1, 2) the mantissa of c, the 2^23 (2 - m) numbers in [m, 2) are divided into
[1, 2 / m), which has 2^23 (2 / m - 1), m times fewer. Nor has it one of ours for each of theirs whose mantissa is 2 / m
or more. So whoever holds the nearest number also keeps by how many units in the last place the way back misses the
original: 0, 1 or -1, but for denormals.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MISSES = "misses"
"""Kind of state under which an imported checkpoint keeps what `missed_theirs` says of a layer, [L, ...] of theirs."""


@dataclass(frozen=True)
class Scaling:
    """Theirs are ours divided by a constant; all tensors are fp32, all misses int8 of the same shape."""

    constant: float

    @property
    def is_exact(self) -> bool:
        """Whether it is a power of 2, so that nothing is rounded (unless numbers become denormal)."""
        return math.frexp(self.constant)[0] == 0.5

    def to_theirs(self, ours: Tensor, misses: Tensor | None = None) -> Tensor:
        """`misses` is `missed_theirs` of the tensor that ours are made of, if ours are still the same."""
        return _followed(ours, self._divided, self._multiplied, misses)

    def to_ours(self, theirs: Tensor, misses: Tensor | None = None) -> Tensor:
        """`misses` is `missed_ours` of the tensor that theirs are made of, if theirs are still the same."""
        return _followed(theirs, self._multiplied, self._divided, misses)

    def missed_ours(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """By how much theirs, multiplied, miss ours."""
        return _units_between(self._multiplied(theirs), ours)

    def missed_theirs(self, theirs: Tensor, ours: Tensor) -> Tensor:
        """By how much ours, divided, miss theirs."""
        return _units_between(self._divided(ours), theirs)

    def _divided(self, values: Tensor) -> Tensor:
        """In doubles, so that it is rounded once."""
        return (values.double() / self.constant).float()

    def _multiplied(self, values: Tensor) -> Tensor:
        return (values.double() * self.constant).float()


def _followed(
    values: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], misses: Tensor | None
) -> Tensor:
    """The nearest numbers, or those that `misses` leads to, wherever they lead back to the values.

    The condition keeps misses that belong to other values from doing harm: they may have changed since.
    """
    nearest = there(values)
    if misses is None:
        return nearest
    wanted = (nearest.view(torch.int32) + misses.int()).view(torch.float32)
    return torch.where(back(wanted) == values, wanted, nearest)


def _units_between(found: Tensor, wanted: Tensor) -> Tensor:
    """Steps from one fp32 number to the next; zeros and denormals are steps like others."""
    return (wanted.contiguous().view(torch.int32) - found.view(torch.int32)).to(torch.int8)
