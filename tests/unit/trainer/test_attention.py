"""Attention against a masked softmax written out: values, gradients, and what it costs."""

import pytest
import torch
from torch import Tensor

from trainer.model.attention import attend
from trainer.model.banded_attention import _block_mask

B, N, D = 2, 4, 8


def written_out(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    s, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    distance = torch.arange(s)[:, None] - torch.arange(s)
    unseen = (distance < 0) | (distance >= (window or s))
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(unseen, float("-inf"))
    return scores.softmax(-1) @ value


def tensors(s: int, kv_heads: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(B, N, s, D), (B, kv_heads, s, D), (B, kv_heads, s, D), (B, N, s, D)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [N, 2, 1])
@pytest.mark.parametrize(("s", "window"), [(24, None), (24, 8), (24, 1), (24, 2), (23, 7), (23, 24), (5, 4), (16, 15)])
def test_values_and_gradients(s: int, window: int | None, kv_heads: int) -> None:
    *inputs, gradient = tensors(s, kv_heads)
    for tensor in inputs:
        tensor.requires_grad_()
    expected, got = written_out(*inputs, window), attend(*inputs, window)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_scores_too_large_to_exponentiate() -> None:
    query, key, value, _ = tensors(24)
    query = query * 1000
    torch.testing.assert_close(attend(query, key, value, 8), written_out(query, key, value, 8))


def test_dropout_in_a_band_drops_whole_weights_and_keeps_the_mean() -> None:
    """With values of one, a row is the sum of the kept weights over 1 - p; over many rows its mean is one."""
    query, key, _, _ = tensors(4096)
    value = torch.ones_like(key)
    torch.manual_seed(1)
    rows = attend(query, key, value, 64, dropout=0.25)[..., 0]
    assert rows.std() > 0.01
    assert rows.mean().item() == pytest.approx(1, abs=0.01)


def test_the_gpu_mask_is_the_same_band() -> None:
    mask = _block_mask(24, 7, device="cpu")
    position = torch.arange(24)
    seen = mask.mask_mod(0, 0, position[:, None], position)
    distance = position[:, None] - position
    assert torch.equal(seen, (distance >= 0) & (distance < 7))


def saved_bytes(s: int, window: int) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    *inputs, _ = tensors(s)
    for tensor in inputs:
        tensor.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(*inputs, window)
    return sum(storages.values())


def test_memory_kept_for_backward_is_linear() -> None:
    assert saved_bytes(4096, 64) == 4 * saved_bytes(1024, 64)
