"""Initial weights: the same number for the same element in every layout, and numbers that are truly normal."""

import hashlib
import math
import struct
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_gpt import ReferenceGPT
from trainer.config import ModelConfig
from trainer.model import init
from trainer.model.init import initial_values, standard_normal
from trainer.model.sharding import Box

KEY = "decoder.layers.mlp.linear_fc1.weight"
SPLITMIX_REFERENCE = {
    # seed: the first outputs of the published generator
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
    1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
}


def whole(key: str, *shape: int) -> Box:
    return Box(key, shape, (0,) * len(shape), shape, 0)


def plain_splitmix64(state: int) -> int:
    """The generator's output function on Python's own integers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_normal(seed: int, key: str, index: int) -> float:
    """The variate of one element of a global tensor, by its flat index, with nothing but the standard library."""
    (stream,) = struct.unpack("<q", hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest())
    bits = plain_splitmix64(stream + index * 0x9E3779B97F4A7C15)
    radius = math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
    return radius * math.cos(2 * math.pi * ((bits & 0xFFFFFFFF) + 0.5) / 2**32)


# ---------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("seed", SPLITMIX_REFERENCE)
def test_plain_splitmix64_is_the_published_one(seed: int) -> None:
    outputs = [plain_splitmix64(seed + (n + 1) * 0x9E3779B97F4A7C15) for n in range(3)]
    assert outputs == SPLITMIX_REFERENCE[seed]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_splitmix64_on_tensors_equals_plain_integers(states: list[int]) -> None:
    assert [x % 2**64 for x in init._splitmix64(torch.tensor(states)).tolist()] == [plain_splitmix64(x) for x in states]


@given(
    seed=st.integers(0, 2**31 - 1),
    key=st.sampled_from([KEY, "embedding.word_embeddings.weight"]),
    index=st.integers(0, 2**45),
)
def test_values_equal_a_plain_implementation(seed: int, key: str, index: int) -> None:
    box = Box(key, (2**20, 2**26), (index >> 26, index & (2**26 - 1)), (1, 1), 0)
    assert standard_normal(seed, box).item() == pytest.approx(plain_normal(seed, key, index), rel=2e-7, abs=1e-9)


def test_values_stay_what_they_have_always_been() -> None:
    """A change of these breaks every comparison with an earlier run."""
    values = standard_normal(1234, whole(KEY, 2, 3))
    expected = [[2.1877502, 0.1744824, -1.0931837], [0.1174523, 1.4673199, -2.5048216]]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- layouts agree


@st.composite
def blocks(draw: st.DrawFn) -> Box:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    offset = [draw(st.integers(0, size - 1)) for size in shape]
    part = [draw(st.integers(1, size - start)) for size, start in zip(shape, offset, strict=True)]
    return Box(draw(st.sampled_from([KEY, "a"])), tuple(shape), tuple(offset), tuple(part), draw(st.integers(0, 9)))


def slice_of(values: Tensor, box: Box) -> Tensor:
    return values[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]


@given(box=blocks(), seed=st.integers(0, 2**31 - 1))
def test_a_block_has_the_values_it_has_in_the_whole(box: Box, seed: int) -> None:
    values = standard_normal(seed, box)
    assert values.dtype == torch.float32 and values.shape == box.shape
    assert torch.equal(values, slice_of(standard_normal(seed, whole(box.key, *box.global_shape)), box))


@pytest.mark.parametrize("at_once", [1, 7, 8, 50, 10**6])
def test_values_do_not_depend_on_how_many_are_drawn_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(KEY, (5, 9, 11), (1, 2, 3), (3, 5, 8), 0)
    expected = standard_normal(3, box)
    monkeypatch.setattr(init, "_ELEMENTS_AT_ONCE", at_once)
    assert torch.equal(standard_normal(3, box), expected)


# ------------------------------------------------------------------------------------------------------ distribution


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("seed", [0, 1234])
def test_values_are_standard_normal(seed: int) -> None:
    """Each statistic within 4.5 of its own standard deviations."""
    values = standard_normal(seed, whole(KEY, 8, 256, 512)).double()
    n = values.numel()
    ordered, ranks = values.flatten().sort().values, torch.arange(1, n + 1) / n
    deviations = {
        "mean": values.mean() * math.sqrt(n),
        "variance": (values.square().mean() - 1) * math.sqrt(n / 2),
        "skewness": values.pow(3).mean() * math.sqrt(n / 15),
        "fourth moment": (values.pow(4).mean() - 3) * math.sqrt(n / 96),
        "tail beyond 4": ((values.abs() > 4).sum() - n * 6.334e-5) / math.sqrt(n * 6.334e-5),
        "next element": correlation(values[..., 1:], values[..., :-1]) * math.sqrt(n),
        "next row": correlation(values[:, 1:], values[:, :-1]) * math.sqrt(n),
        "next layer": correlation(values[1:], values[:-1]) * math.sqrt(n),
        "squares of neighbours": correlation(values[..., 1:] ** 2, values[..., :-1] ** 2) * math.sqrt(n),
    }
    assert {name: float(found) for name, found in deviations.items() if abs(found) > 4.5} == {}
    kolmogorov_smirnov = (torch.special.ndtr(ordered) - ranks).abs().max() * math.sqrt(n)
    assert kolmogorov_smirnov < 2.2  # exceeded once in 8,000


def test_tensors_and_seeds_are_independent() -> None:
    variants = [(0, KEY), (1, KEY), (2, KEY), (0, "decoder.layers.mlp.linear_fc2.weight"), (0, KEY + "x"), (10, KEY)]
    drawn = [standard_normal(seed, whole(key, 300, 400)) for seed, key in variants]
    for i, mine in enumerate(drawn):
        for theirs in drawn[:i]:
            assert abs(correlation(mine, theirs)) < 4.5 / math.sqrt(mine.numel())
    # the hash of a stream must not make one stream another's tail
    flat = torch.cat([values.flatten()[:20_000] for values in drawn])
    assert flat.unique().numel() > 0.99 * flat.numel()


# ----------------------------------------------------------------------------------------------- what each tensor gets


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_model_starts_as_published(norm: Literal["pre", "post"], tied: bool) -> None:
    sizes: dict[str, Any] = {"num_layers": 3, "hidden_size": 96, "num_heads": 4, "vocab_size": 256, "seq_length": 64}
    model = ModelConfig(**sizes, norm_placement=norm, tied_embeddings=tied, init_std=0.05)
    reference = ReferenceGPT(
        **sizes, ffn_hidden_size=384, padded_vocab_size=256, norm_placement=norm, tied_embeddings=tied
    )
    seen = set()
    for key, tensor in reference.global_tensors().items():
        values = initial_values(whole(key, *tensor.shape), model, seed=0)
        if key.endswith(".bias"):
            kind, expected = "bias", (0.0, 0.0)
        elif "norm" in key:
            kind, expected = "norm", (1.0, 0.0)
        elif key.endswith(("linear_proj.weight", "linear_fc2.weight")):
            kind, expected = "residual projection", (0.0, 0.05 / math.sqrt(2 * 3))
        else:
            kind, expected = "matrix", (0.0, 0.05)
        seen.add(kind)
        n, (mean, std) = values.numel(), expected
        assert abs(values.mean() - mean) <= 4.5 * std / math.sqrt(n), key
        assert abs(values.std() - std) <= 4.5 * std / math.sqrt(2 * n), key
    assert seen == {"bias", "norm", "residual projection", "matrix"}
