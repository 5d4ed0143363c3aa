"""Numbers divided by a root and multiplied by it come back to the last bit."""

import math

import pytest
import torch
from torch import Tensor

from trainer.checkpoint.huggingface.rounding import Scaling

HEAD_SIZES = (8, 32, 64, 80, 96, 128)  # of the GPT-3 sizes, and small ones


def mantissas(stride: int = 59) -> Tensor:
    """fp32 numbers in [1, 2), which has 2^23; with a stride of 1 all of them."""
    return torch.arange(0x3F800000, 0x40000000, stride, dtype=torch.int32).view(torch.float32)


def awkward_numbers() -> Tensor:
    tiny = torch.finfo(torch.float32).smallest_normal
    return torch.tensor([0.0, -0.0, 1e-45, -1e-45, 100e-45, tiny, -tiny, tiny / 2, 1e-30, -1e30, 3.4e38])


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("values", [mantissas(), -0.02 * mantissas(), awkward_numbers()], ids=lambda v: len(v))
def test_ours_come_back_and_then_nothing_moves(head_size: int, values: Tensor) -> None:
    scaling = Scaling(math.sqrt(head_size))
    theirs = scaling.to_theirs(values)
    torch.testing.assert_close(theirs, values / math.sqrt(head_size), rtol=3e-7, atol=1e-44)
    ours = scaling.to_ours(theirs, scaling.missed_ours(values, theirs))
    assert bits_equal(ours, values)
    assert bits_equal(scaling.to_theirs(ours, scaling.missed_theirs(theirs, ours)), theirs)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_theirs_come_back(head_size: int) -> None:
    scaling, values = Scaling(math.sqrt(head_size)), mantissas()
    ours = scaling.to_ours(values)
    assert bits_equal(scaling.to_theirs(ours, scaling.missed_theirs(values, ours)), values)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_mantissa_comes_back(head_size: int) -> None:
    scaling, values = Scaling(math.sqrt(head_size)), mantissas(stride=1)
    theirs, ours = scaling.to_theirs(values), scaling.to_ours(values)
    assert bits_equal(scaling.to_ours(theirs, scaling.missed_ours(values, theirs)), values)
    assert bits_equal(scaling.to_theirs(ours, scaling.missed_theirs(values, ours)), values)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_only_roots_that_are_powers_of_two_need_nothing_kept(head_size: int) -> None:
    """What the module's docstring proves: the numbers of one interval outnumber those that they are divided into."""
    scaling, values = Scaling(math.sqrt(head_size)), mantissas(stride=1)[-(1 << 18) :]
    is_exact = not scaling.missed_ours(values, scaling.to_theirs(values)).any()
    assert is_exact == scaling.is_exact == (head_size == 64)
    mantissa = 2 * math.frexp(scaling.constant)[0]
    assert mantissa < values[0]
    assert len(scaling.to_theirs(values).unique()) <= len(values) / mantissa + 1


def test_misses_of_other_numbers_do_no_harm() -> None:
    """Weights that were changed after they were exported, beside a file that was not."""
    scaling, values = Scaling(math.sqrt(128)), torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    misses = torch.randint(-1, 2, values.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    assert bits_equal(scaling.to_theirs(scaling.to_ours(values, misses)), scaling.to_theirs(scaling.to_ours(values)))
    torch.testing.assert_close(scaling.to_ours(values, misses), scaling.to_ours(values), rtol=2e-7, atol=0)


def bits_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
