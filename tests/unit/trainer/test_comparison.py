"""Checkpoints compared tensor by tensor, against the same done by numpy on the whole tensors."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_checkpoints import write_checkpoint
from peak_memory import peak_growth_mb
from trainer.checkpoint.format import comparison
from trainer.checkpoint.format.comparison import TensorDifference, compare, parts, statistics


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("<f4")


SHAPES = {"master/a": (6, 4), "master/b": (9,), "exp_avg/a": (6, 4), "exp_avg/b": (9,)}
TENSORS = {name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}


@given(st.lists(st.integers(1, 6), max_size=4).map(tuple), st.integers(1, 40))
def test_parts_cover_a_tensor_once_in_order_and_none_is_too_large(shape: tuple[int, ...], most: int) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    cut = [
        numbers[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
        for offset, size in parts(shape, most)
    ]
    assert all(part.size <= most for part in cut)
    assert np.array_equal(np.concatenate([part.ravel() for part in cut]), numbers.ravel())


def test_equal_tensors_are_equal_in_whatever_files_they_lie(tmp_path: Path) -> None:
    first, second = (write_checkpoint(tmp_path, step, TENSORS, files) for step, files in ((1, 1), (2, 5)))
    assert list(compare(first, second)) == [None] * 4


@pytest.mark.parametrize("most_elements", [1 << 24, 5])
def test_a_difference_is_what_numpy_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_elements: int) -> None:
    monkeypatch.setattr(parts, "__defaults__", (most_elements,))
    changed = {**TENSORS, "master/a": TENSORS["master/a"] + np.where(np.arange(24).reshape(6, 4) % 7 == 3, 1e-3, 0)}
    changed["master/a"] = changed["master/a"].astype("<f4")
    first, second = write_checkpoint(tmp_path, 1, TENSORS, 2), write_checkpoint(tmp_path, 2, changed, 3)
    (found,) = filter(None, compare(first, second))
    a, b = TENSORS["master/a"].astype(float), changed["master/a"].astype(float)
    assert (found.name, found.shapes, found.num_different) == ("master/a", ((6, 4), (6, 4)), 3)
    assert found.max_abs == np.abs(a - b).max()
    assert found.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)


def test_what_is_missing_or_of_another_shape_is_named_and_comes_first(tmp_path: Path) -> None:
    other = {"master/a": TENSORS["master/a"].T.copy(), "master/b": -TENSORS["master/b"], "master/c": drawn(2)}
    first, second = write_checkpoint(tmp_path, 1, TENSORS), write_checkpoint(tmp_path, 2, other)
    found = {each.name: each for each in compare(first, second) if each}
    assert found["master/a"] == TensorDifference("master/a", ((6, 4), (4, 6)))
    assert found["exp_avg/a"].shapes == ((6, 4), None) and found["master/c"].shapes == (None, (2,))
    assert found["master/b"].relative == pytest.approx(2.0)
    assert min(found.values(), key=lambda each: each.badness).name == "master/b"
    assert [each.name for each in compare(first, second, "master") if each] == ["master/a", "master/b", "master/c"]


def test_one_bit_counts_and_so_does_what_is_no_number(tmp_path: Path) -> None:
    zeros = np.zeros(4, dtype="<f4")
    signed, broken = zeros.copy(), zeros.copy()
    signed[1], broken[2] = -0.0, np.nan
    names = {"zero": zeros, "signed": signed, "broken": broken}
    made = {
        name: write_checkpoint(tmp_path, step, {"master/w": w}) for step, (name, w) in enumerate(names.items(), start=1)
    }
    (found,) = compare(made["zero"], made["signed"])
    assert found is not None and (found.num_different, found.max_abs, found.relative) == (1, 0.0, 0.0)
    (found,) = compare(made["zero"], made["broken"])
    assert found is not None and (found.num_different, found.max_abs, found.relative) == (1, math.inf, math.inf)
    assert list(compare(made["broken"], made["broken"])) == [None]


def test_statistics_are_those_of_the_finite_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "__defaults__", (7,))
    tensor = drawn(5, 6, 2)
    finite = tensor.astype(float).ravel()[2:]
    tensor[0, 0] = np.nan, -np.inf
    checkpoint = write_checkpoint(tmp_path, 1, {"master/w": tensor, "master/none": np.full(3, np.nan)}, 3)
    found = statistics(checkpoint, "master/w")
    assert (found.num_elements, found.num_not_finite) == (60, 2)
    assert (found.smallest, found.largest) == (finite.min(), finite.max())
    assert found.norm == pytest.approx(np.linalg.norm(finite)) and found.mean == pytest.approx(finite.mean())
    nothing = statistics(checkpoint, "master/none")
    assert (nothing.num_not_finite, nothing.norm) == (3, 0.0) and math.isnan(nothing.mean)


def test_memory_holds_a_part_and_not_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"master/w": np.ones((64, 1 << 17), dtype="<f4")}  # 32 MB
    first, second = (write_checkpoint(tmp_path, step, large, 2) for step in (1, 2))
    assert list(comparison.compare(first, second)) == [None]  # what is imported once is not counted
    monkeypatch.setattr(parts, "__defaults__", (1 << 17,))
    assert peak_growth_mb(lambda: list(comparison.compare(first, second))) < 16
