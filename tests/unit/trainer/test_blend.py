"""The blend: which data set the n-th sample comes from, and what a run takes from each."""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.shards import ShardWriter, TokenBatch
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data.batches import TrainingData, heldout_windows
from trainer.data.blend import PERIOD, Blend, blend_in_force, epochs, quantize
from trainer.data.prepared import PreparedFolder
from trainer.data.windows import HeldoutReader, WindowReader
from trainer.data_config import BLENDS

GPT3 = BLENDS["gpt3"]
SEQ = 4


def config_of(blend: dict[str, float] | None = None, **sections: Any) -> RunConfig:
    return from_tree(
        {
            "model": {"seq_length": SEQ},
            "train": {"global_batch_size": 12, "total_tokens": 12 * SEQ},
            "data": {"prepared": "anywhere", "blend": blend},
        }
        | sections
    )


def named(weights: list[float]) -> dict[str, float]:
    return {f"set{number}": weight for number, weight in enumerate(weights)}


def prefix_counts(blend: Blend, num_samples: int) -> np.ndarray:
    """How many of the first n samples are of each data set, [num_samples, data sets], for n = 1, 2, ..."""
    datasets, _ = blend.locate(np.arange(num_samples))
    return np.cumsum(datasets[:, None] == np.arange(len(blend.names)), axis=0)


# -------------------------------------------------------------------------------------------------------------- layout


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
@example(weights=list(GPT3.values()))
@example(weights=[0.5, *[0.5 / 60] * 60])  # ordered by ideal times instead, the first would fall far behind
@example(weights=[1.0, 1e-9, 1e-9])
@example(weights=[1.0] * 3)
def test_no_prefix_is_a_whole_sample_off(weights: list[float]) -> None:
    blend = Blend(named(weights))
    num_samples = np.arange(1, 2 * PERIOD + 1)[:, None]
    ideal = num_samples * np.array(blend.counts) / PERIOD
    counts = prefix_counts(blend, 2 * PERIOD)
    assert np.abs(counts - ideal).max() < 1
    # of the weights as given: the part of a sample in each period that whole counts cannot express comes on top
    shares = np.array(weights) / sum(weights)
    assert (np.abs(counts / num_samples - shares) < 1 / num_samples + len(weights) / PERIOD).all()


def test_gpt3_has_its_weights_to_a_fraction_of_a_percent_in_any_prefix() -> None:
    blend = Blend(GPT3)
    shares = np.array(list(GPT3.values())) / sum(GPT3.values())  # the table sums to 1.01
    counts, num_samples = prefix_counts(blend, 3 * PERIOD), np.arange(1, 3 * PERIOD + 1)[:, None]
    assert np.abs(counts - num_samples * shares).max() < 2
    assert np.abs(counts[999:] / num_samples[999:] - shares).max() < 0.001
    assert np.abs(counts[-1] / num_samples[-1] / shares - 1).max() < 0.0005


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=40), scale=st.sampled_from([2.0**-20, 1024.0]))
def test_quantized_weights(weights: list[float], scale: float) -> None:
    counts = quantize(weights)
    assert sum(counts) == PERIOD and min(counts) >= 1
    assert quantize([weight * scale for weight in weights]) == counts
    raised = sum(count == 1 for count in counts)
    total = sum(map(Fraction, weights))
    for weight, count in zip(weights, counts, strict=True):
        quota = Fraction(weight) * PERIOD / total
        assert abs(count - quota) < 1 + raised, "others gave up a sample for each that was raised to one"
    for (a, a_count), (b, b_count) in itertools.pairwise(sorted(zip(weights, counts, strict=True))):
        assert a_count <= b_count or a == b


def test_quantized_by_largest_remainders() -> None:
    assert quantize([1.0]) == [PERIOD]
    assert quantize([1, 1, 1]) == [21846, 21845, 21845]  # a tie goes to the first
    assert quantize([0.60, 0.22, 0.08, 0.08, 0.03]) == [38932, 14275, 5191, 5191, 1947]
    assert quantize([60, 22, 8, 8, 3]) == [38932, 14275, 5191, 5191, 1947]
    assert quantize([1e12, 1e-12, 1e-12]) == [PERIOD - 2, 1, 1]


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    start=st.one_of(st.integers(0, 3 * PERIOD), st.just(10**12)),
)
def test_samples_of_a_data_set_are_counted_without_gaps(weights: list[float], start: int) -> None:
    """locate at any place continues what came before: the index of a sample is the number drawn before it."""
    blend = Blend(named(weights))
    before = blend.drawn(start)
    datasets, indices = blend.locate(np.arange(start, start + 300))
    seen = Counter(before)
    for dataset, index in zip(datasets.tolist(), indices.tolist(), strict=True):
        assert index == seen[blend.names[dataset]]
        seen[blend.names[dataset]] += 1
    assert seen == Counter(blend.drawn(start + 300))


def test_drawn_is_what_locate_counts() -> None:
    blend = Blend(GPT3)
    counts = prefix_counts(blend, PERIOD + 1000)
    for num_samples in (1, 2, 10, PERIOD - 1, PERIOD, PERIOD + 1000):
        assert list(blend.drawn(num_samples).values()) == counts[num_samples - 1].tolist()
    assert set(blend.drawn(0).values()) == {0}


def test_a_single_data_set_is_counted_through() -> None:
    positions = np.array([0, 1, PERIOD - 1, PERIOD, 10**12])
    datasets, indices = Blend({"only": 3.0, "left_out": 0.0}).locate(positions)
    assert not datasets.any() and indices.tolist() == positions.tolist()


# --------------------------------------------------------------------------------------------------- the blend in force


def test_whose_blend_is_in_force() -> None:
    tokens, own = {"a": 3 * SEQ + 1, "b": SEQ + 1}, {"a": 1.0, "b": 1.0}
    half = [PERIOD // 2] * 2
    assert blend_in_force(config_of({"a": 7, "b": 1}), tokens, own).counts == [PERIOD * 7 // 8, PERIOD // 8]
    assert blend_in_force(config_of(), tokens, own).counts == half
    assert blend_in_force(config_of(), tokens, None).counts == [PERIOD * 3 // 4, PERIOD // 4]  # by windows
    its_own_data = config_of(data={})  # the config says all there is to say of it
    assert blend_in_force(its_own_data, tokens, own).counts == [PERIOD * 3 // 4, PERIOD // 4]
    # in the order of the data sets, however the weights are written down
    assert blend_in_force(config_of({"b": 1, "a": 7}), tokens, None).names == ("a", "b")
    assert blend_in_force(config_of({"a": 1, "b": 0}), tokens, None).names == ("a",)


@pytest.mark.parametrize(
    ("blend", "own", "message"),
    [
        ({"a": 1, "b": 1, "d": 1}, None, "there is no data set d; known: a, b, short"),
        ({"a": 1}, None, r"b has no weight; give it one \(0 leaves it out\) beside the others"),
        (None, {"a": 1, "b": 0, "short": 0, "e": 1}, "there is no data set e; known: a, b, short"),
        (None, {"a": 0, "b": 0, "short": 0}, "the weights of a, b, short sum to 0; give one a weight above 0"),
        (
            {"a": 1, "b": 1, "short": 0.1},
            None,
            r"data set short holds 4 training tokens, fewer than one sequence of model\.seq_length 4 \+ 1; "
            r"add text or shorten the sequence, or give short weight 0 in data\.blend",
        ),
        (None, None, "data set short holds 4 training tokens"),
    ],
)
def test_a_blend_that_does_not_fit(blend: dict[str, float] | None, own: dict[str, float] | None, message: str) -> None:
    tokens = {"a": 100, "b": 100, "short": SEQ}
    with pytest.raises(UserError, match=message) as caught:
        blend_in_force(config_of(blend), tokens, own)
    assert "\n" not in str(caught.value)


def test_a_data_set_without_weight_may_be_short() -> None:
    assert blend_in_force(config_of({"a": 1, "b": 0}), {"a": 100, "b": 0}, None).names == ("a",)


def test_epochs_of_gpt3() -> None:
    """Table 2.2 of the paper, whose weights sum to 1.01; its own epochs do not follow from them (2.9 of WebText2)."""
    tokens = {"common_crawl": 410e9, "webtext2": 19e9, "books1": 12e9, "books2": 55e9, "wikipedia": 3e9}
    config = from_tree(
        {
            "model": {"seq_length": 2048},
            "train": {"global_batch_size": 1536, "total_tokens": "300B"},
            "data": {"prepared": "anywhere", "blend": "gpt3"},
        }
    )
    uses = epochs(config, {name: int(size) for name, size in tokens.items()})
    total = -(-300_000_000_000 // (1536 * 2048)) * 1536
    assert [use.name for use in uses] == list(tokens) and sum(use.samples for use in uses) == total
    expected = {"common_crawl": 0.4346, "webtext2": 3.439, "books1": 1.980, "books2": 0.4320, "wikipedia": 2.970}
    for use in uses:
        assert use.share == pytest.approx(GPT3[use.name] / 1.01, abs=1 / PERIOD)
        assert use.samples == pytest.approx(use.share * total, abs=1)
        assert use.epochs == pytest.approx(expected[use.name], rel=5e-4)


def test_epochs_of_a_data_set_left_out() -> None:
    used, left_out = epochs(config_of({"a": 1, "b": 0}), {"a": 3 * SEQ + 1, "b": 2})
    assert (used.samples, used.epochs, used.share) == (12, 4.0, 1.0)
    assert (left_out.name, left_out.tokens, left_out.samples, left_out.epochs, left_out.share) == ("b", 2, 0, 0.0, 0.0)


# ----------------------------------------------------------------------------------------------- training and held-out

SIZES = {"a": 50, "b": 50, "c": 7}  # windows; a and b are as long as each other
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def write_counting(prefix: Path, first: int, num_windows: int) -> None:
    """Tokens that count up from `first`, so that a token says which data set and place it is of."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.arange(first, first + num_windows * SEQ, dtype=np.uint16)
    with ShardWriter(prefix, 60_000, end_of_text_id=first + num_windows * SEQ) as writer:
        if num_windows:
            writer.add(TokenBatch.of([tokens]))
        writer.finish()
        writer.commit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    path = tmp_path_factory.mktemp("prepared")
    for number, (name, size) in enumerate(SIZES.items()):
        write_counting(path / name / "train", number * 1000, size)
        write_counting(path / name / "heldout", number * 1000, 0 if name == "b" else size)
    return PreparedFolder(path, {name: path / name for name in SIZES}, blend=WEIGHTS)


def windows_of(tokens: torch.Tensor) -> list[tuple[str, int]]:
    """Which windows of the counting data sets these are; asserts that each holds the tokens it should."""
    assert tokens.dtype == torch.int64 and tokens.shape[1] == SEQ + 1
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(SEQ + 1))
    return [("abc"[first // 1000], first % 1000 // SEQ) for first in tokens[:, 0].tolist()]


def order(folder: PreparedFolder, first: int, count: int, **sections: Any) -> list[tuple[str, int]]:
    return windows_of(TrainingData.open(folder, config_of(**sections)).replica_tokens(first, count, 0))


def test_every_data_set_goes_through_its_windows_at_its_own_pace(folder: PreparedFolder) -> None:
    run = order(folder, 0, 1200)
    assert Counter(name for name, _ in run) == {"a": 600, "b": 360, "c": 240}
    for name, size in SIZES.items():
        mine = [window for of, window in run if of == name]
        whole = [mine[start : start + size] for start in range(0, len(mine) // size * size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in whole)
        assert len({tuple(epoch) for epoch in whole}) == len(whole)
        rest = mine[len(whole) * size :]
        assert len(set(rest)) == len(rest)


def test_data_sets_of_one_size_do_not_share_an_order(folder: PreparedFolder) -> None:
    run = order(folder, 0, 200)
    mine, theirs = ([window for of, window in run if of == name][:50] for name in "ab")
    assert sum(a == b for a, b in zip(mine, theirs, strict=True)) <= 8


def test_the_seed_decides_the_order_and_not_the_blend(folder: PreparedFolder) -> None:
    first, second = (order(folder, 0, 300, seed=seed) for seed in (1, 2))
    assert first != second and [name for name, _ in first] == [name for name, _ in second]


@pytest.mark.parametrize("first", [0, 12, PERIOD - 5, 10**9])
def test_every_layout_draws_the_same_global_batch(folder: PreparedFolder, first: int) -> None:
    whole = order(folder, first, 12)
    for micro, data in ((1, 2), (2, 3), (3, 4), (1, 12), (6, 1)):
        config = config_of(train={"global_batch_size": 12, "micro_batch_size": micro}, parallel={"data": data})
        samples = TrainingData.open(folder, config)
        parts = [samples.replica_tokens(first, 12, rank).split(micro) for rank in range(data)]
        at_once = [part for micros in zip(*parts, strict=True) for part in micros]
        assert windows_of(torch.cat(at_once)) == whole


def test_batches_of_any_size_follow_each_other_in_one_order(folder: PreparedFolder) -> None:
    whole = order(folder, PERIOD - 100, 300)
    found: list[tuple[str, int]] = []
    for size in (1, 4, 60, 35, 200):
        found += order(folder, PERIOD - 100 + len(found), size)
    assert found == whole


def test_heldout_windows_of_all_data_sets_are_numbered_through(folder: PreparedFolder) -> None:
    """b has none, and what it is blended at plays no part."""
    reader = HeldoutReader(folder, SEQ)
    everything = [(name, window) for name in "ac" for window in range(SIZES[name])]
    assert reader.num_windows == len(everything) == 57
    assert windows_of(reader.windows(range(57))) == everything
    assert windows_of(reader.windows([56, 0, 50, 49])) == [("c", 6), ("a", 0), ("c", 0), ("a", 49)]
    config = config_of({"a": 1, "b": 1, "c": 0}, evaluation={"max_sequences": 30})
    drawn = windows_of(reader.windows(heldout_windows(reader, config)))
    assert len(set(drawn)) == 30 and {name for name, _ in drawn} == {"a", "c"}


def test_shards_of_different_token_types_blend(tmp_path: Path) -> None:
    for name, vocab_size in (("a", 1000), ("b", 100_000)):
        with ShardWriter(tmp_path / name, vocab_size, end_of_text_id=9) as writer:
            tokens = np.full(SEQ + 1, vocab_size - 1, np.uint16 if name == "a" else np.int32)
            writer.add(TokenBatch.of([tokens]))
            writer.finish()
            writer.commit()
    readers = [WindowReader(tmp_path / name, SEQ) for name in "ab"]
    samples = TrainingData(readers, Blend({"a": 1, "b": 1}), config_of())
    tokens = samples.replica_tokens(0, 12, 0)
    assert sorted(tokens[:, 0].tolist()) == [999] * 6 + [99_999] * 6
