"""The data order: which tokens the n-th sample of a run is, on whichever rank, in whichever layout."""

import math
import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from data_pipeline.shards import ShardWriter, TokenBatch, token_dtype
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree
from trainer.data.batches import MicroBatch, ReadAhead, TrainingData, heldout_micro_batches, heldout_windows
from trainer.data.blend import Blend
from trainer.data.digest import digest
from trainer.data.permutation import permute, permute_groups
from trainer.data.prepared import PreparedFolder
from trainer.data.windows import HeldoutReader, WindowReader

CPU = torch.device("cpu")
SEQ = 5
KEYS = [f"{seed}:{epoch}" for seed in (0, 1, 1234) for epoch in (0, 1, 7)]


def write_megatron(prefix: Path, documents: list[list[int]], dtype: Any = np.int32) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def counting_folder(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    """Token i is i, so that a window's first token says where it lies: 37 windows and three tokens that fill none."""
    folder, tokens = tmp_path_factory.mktemp("data"), list(range(37 * SEQ + 1 + 3))
    for name in ("train", "heldout"):
        write_megatron(folder / name, [tokens[:50], tokens[50:51], tokens[51:]])
    return PreparedFolder.open(folder)


@pytest.fixture(scope="module")
def counting(counting_folder: PreparedFolder) -> WindowReader:
    return WindowReader(counting_folder.path / "train", SEQ)


@pytest.fixture(scope="module")
def counting_heldout(counting_folder: PreparedFolder) -> HeldoutReader:
    return HeldoutReader(counting_folder, SEQ)


def training_data(reader: WindowReader, config: RunConfig) -> TrainingData:
    return TrainingData([reader], Blend({"text": 1.0}), config)


def config_of(global_batch: int = 12, micro: int = 1, data: int = 1, seed: int = 5, **sections: Any) -> RunConfig:
    return from_tree(
        {
            "seed": seed,
            "model": {"seq_length": SEQ},
            "train": {"global_batch_size": global_batch, "micro_batch_size": micro},
            "parallel": {"data": data, **sections.pop("parallel", {})},
            **sections,
        }
    )


def window_numbers(batches: list[MicroBatch]) -> list[int]:
    """Which windows of the counting data set these are; asserts that each holds the tokens it should."""
    tokens = torch.cat([batch.tokens for batch in batches])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(SEQ + 1))
    return (tokens[:, 0] // SEQ).tolist()


def replica_batches(samples: TrainingData, first_sample: int, rank: int = 0) -> list[MicroBatch]:
    """The micro-batches of a full batch."""
    train = samples.config.train

    def read(step: int) -> torch.Tensor:
        return samples.replica_tokens(first_sample, train.global_batch_size, rank)

    with ReadAhead(read, 1, train.micro_batch_size, CPU) as batches:
        return batches.micro_batches(0)


def global_order(reader: WindowReader, config: RunConfig, first_sample: int) -> list[int]:
    """Window numbers of a global batch, put together from every replica: micro-batch by micro-batch, rank by rank."""
    samples = training_data(reader, config)
    per_rank = [replica_batches(samples, first_sample, rank) for rank in range(config.parallel.data)]
    assert {len(batches) for batches in per_rank} == {config.num_microbatches}
    assert {batch.tokens.shape[0] for batches in per_rank for batch in batches} == {config.train.micro_batch_size}
    assert all(batch.weight is None for batches in per_rank for batch in batches)
    return window_numbers([batch for at_once in zip(*per_rank, strict=True) for batch in at_once])


# -------------------------------------------------------------------------------------------------------- permutation


@given(size=st.integers(1, 3000), key=st.text(max_size=10))
def test_permute_is_a_permutation(size: int, key: str) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65535, 65536, 65537])
def test_permute_is_a_permutation_at_powers_of_two(size: int) -> None:
    for key in KEYS:
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 - 1, 3 * 2**50])
def test_permute_is_one_to_one_where_sizes_exceed_32_bits(size: int) -> None:
    inputs = np.concatenate([np.arange(20_000), size - 1 - np.arange(20_000)])
    outputs = permute(inputs, size, "0:0")
    assert len(np.unique(outputs)) == len(inputs)
    assert outputs.min() >= 0 and size // 2 < outputs.max() < size
    assert abs(np.mean(outputs / size) - 0.5) < 4 * math.sqrt(1 / 12 / len(inputs))


@given(size=st.integers(1, 500), data=st.data())
def test_permute_of_some_indices_is_that_part_of_the_whole(size: int, data: st.DataObject) -> None:
    some = np.array(data.draw(st.lists(st.integers(0, size - 1))), dtype=np.int64)
    before = some.copy()
    assert np.array_equal(permute(some, size, "k"), permute(np.arange(size), size, "k")[some])
    assert np.array_equal(some, before)


@pytest.mark.parametrize("size", [1000, 4096, 10_007])
@pytest.mark.parametrize("key", KEYS)
def test_permute_looks_random(size: int, key: str) -> None:
    """Statistics of a uniformly drawn permutation, each within 4.5 standard deviations."""
    index, value = np.arange(size), permute(np.arange(size), size, key)
    deviations = {
        "rank correlation": np.corrcoef(index, value)[0, 1] * math.sqrt(size - 1),
        "serial correlation": np.corrcoef(value[:-1], value[1:])[0, 1] * math.sqrt(size - 1),
        "ascents": (np.sum(value[1:] > value[:-1]) - (size - 1) / 2) / math.sqrt((size + 1) / 12),
        "low bit": (np.sum((index ^ value) & 1) - size / 2) / math.sqrt(size / 4),
        "spread of neighbours": chi_square_deviation((value[1:] - value[:-1]) % size * 20 // size, 20),
        "spread over a 10 x 10 table": chi_square_deviation(index * 10 // size * 10 + value * 10 // size, 100),
    }
    assert np.sum(index == value) <= 8  # fixed points are Poisson(1): more than 8 in one of a million
    assert {name: found for name, found in deviations.items() if abs(found) > 4.5} == {}


def chi_square_deviation(cells: NDArray[np.int64], num_cells: int) -> float:
    counts, expected = np.bincount(cells, minlength=num_cells), len(cells) / num_cells
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return max(0.0, (chi_square - (num_cells - 1)) / math.sqrt(2 * (num_cells - 1)))


def test_orders_of_seeds_and_epochs_have_nothing_in_common() -> None:
    size = 2000
    orders = [permute(np.arange(size), size, key) for key in KEYS]
    for i, mine in enumerate(orders):
        for theirs in orders[:i]:
            assert np.sum(mine == theirs) <= 8
            assert abs(np.corrcoef(mine, theirs)[0, 1]) < 4.5 / math.sqrt(size)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_groups_are_permuted_each_as_on_its_own(sizes: list[int], seed: int) -> None:
    draw, keys = np.random.default_rng(seed), [f"{number}" for number in range(len(sizes))]
    groups = draw.integers(0, len(sizes), 50)
    indices = np.array([draw.integers(0, sizes[group]) for group in groups])
    expected = [permute(indices[i : i + 1], sizes[group], keys[group])[0] for i, group in enumerate(groups)]
    assert permute_groups(indices, groups, sizes, keys).tolist() == expected


# ------------------------------------------------------------------------------------------------------------ batches


def test_the_order_of_a_single_data_set_is_that_of_the_first_version(counting: WindowReader) -> None:
    """Old checkpoints hold a position in it."""
    at_start, later = [3, 34, 36, 2, 22, 25, 14, 23, 24, 31, 10, 26], [7, 36, 2, 25, 19, 21, 15, 16, 10, 14, 18, 7]
    assert global_order(counting, config_of(seed=5), 0) == at_start
    assert global_order(counting, config_of(seed=5), 1000 * 37 + 29) == later


@pytest.mark.parametrize("first_sample", [0, 12, 30, 36, 37, 1000 * 37 + 29])
def test_every_layout_sees_the_same_samples_in_the_same_order(counting: WindowReader, first_sample: int) -> None:
    layouts = [
        (micro, data) for micro in (1, 2, 3, 4, 6, 12) for data in (1, 2, 3, 4, 6, 12) if 12 % (micro * data) == 0
    ]
    orders = {tuple(global_order(counting, config_of(12, *layout), first_sample)) for layout in layouts}
    assert len(layouts) > 10 and len(orders) == 1


def test_every_window_comes_once_an_epoch_and_epochs_differ(counting: WindowReader) -> None:
    config = config_of(global_batch=8, micro=2, data=2)  # 37 windows: no epoch ends with a batch
    run = [number for step in range(19) for number in global_order(counting, config, step * 8)]
    epochs = [run[start : start + 37] for start in range(0, 37 * 4, 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batch_larger_than_an_epoch(counting: WindowReader) -> None:
    order = global_order(counting, config_of(global_batch=80, micro=4, data=2), 30)
    assert sorted(order[7:44]) == list(range(37))
    assert len(set(order[44:])) == 36


@pytest.mark.parametrize("step", [0, 1, 4, 5, 17])
def test_resuming_at_a_position_continues_the_run(
    counting: WindowReader, counting_folder: PreparedFolder, step: int
) -> None:
    config = config_of(global_batch=8)
    undisturbed = training_data(counting, config)
    for before in range(step):
        replica_batches(undisturbed, before * 8)
    resumed = TrainingData.open(counting_folder, config)
    expected, found = (replica_batches(data, step * 8) for data in (undisturbed, resumed))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(expected, found, strict=True))


def test_changing_the_global_batch_keeps_the_order(counting: WindowReader) -> None:
    small = [n for step in range(6) for n in global_order(counting, config_of(global_batch=4), step * 4)]
    large = [n for step in range(2) for n in global_order(counting, config_of(global_batch=12), step * 12)]
    assert small == large


def test_the_seed_decides_the_order(counting: WindowReader) -> None:
    assert global_order(counting, config_of(seed=5), 0) == global_order(counting, config_of(seed=5), 0)
    assert global_order(counting, config_of(seed=5), 0) != global_order(counting, config_of(seed=6), 0)


def test_batches_of_any_size_follow_each_other_in_one_order(counting: WindowReader) -> None:
    """What a ramp needs: sizes differ from step to step, and replicas still split them in the same global order."""
    samples, whole = training_data(counting, config_of(data=2)), global_order(counting, config_of(36), 0)
    found: list[int] = []
    for size in (4, 8, 8, 16):
        parts = [samples.replica_tokens(len(found), size, rank)[:, 0] // SEQ for rank in range(2)]
        assert [len(part) for part in parts] == [size // 2, size // 2]
        found += torch.stack(parts, 1).flatten().tolist()
    assert found == whole


# ------------------------------------------------------------------------------------------------------- reading ahead


class Reads:
    """Stands for the disk: says what was read, and reads step `slow` only when told."""

    def __init__(self, slow: int | None = None, broken: int | None = None) -> None:
        self.slow, self.broken, self.steps = slow, broken, list[int]()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.current_thread()

    def __call__(self, step: int) -> torch.Tensor:
        self.thread = threading.current_thread()
        if step == self.slow:
            self.begun.set()
            assert self.go_on.wait(10)
        if step == self.broken:
            raise OSError(f"step {step} cannot be read")
        self.steps.append(step)
        return torch.full((4, 3), step)


def step_of(batches: list[MicroBatch]) -> int:
    assert [batch.tokens.shape for batch in batches] == [(2, 3), (2, 3)]
    (step,) = {int(token) for batch in batches for token in batch.tokens.flatten()}
    return step


def test_the_next_batch_is_read_while_this_one_is_used() -> None:
    read = Reads(slow=1)
    with ReadAhead(read, 3, 2, CPU) as batches:
        assert step_of(batches.micro_batches(0)) == 0  # although step 1 cannot be read yet
        assert read.begun.wait(10)  # its reading has begun before anybody asked for it
        read.go_on.set()
        assert [step_of(batches.micro_batches(step)) for step in (1, 2)] == [1, 2]
    assert read.steps == [0, 1, 2]  # each once, and nothing beyond the end


def test_any_step_may_follow_any_other() -> None:
    """A rollback goes back, a quarantine jumps ahead."""
    with ReadAhead(Reads(), 9, 2, CPU) as batches:
        for step in (0, 1, 5, 2, 2, 8, 0, 1):
            assert step_of(batches.micro_batches(step)) == step


def test_the_digest_is_of_the_batch_given_and_not_of_the_one_read_ahead() -> None:
    with ReadAhead(Reads(), 9, 2, CPU) as batches:
        for step in (0, 1, 5, 2, 2):
            given = torch.cat([batch.tokens for batch in batches.micro_batches(step)])
            assert batches.digest(step) == digest(given)
        with pytest.raises(AssertionError, match="step 3 was not the last one given"):
            batches.digest(3)


def test_the_digest_is_computed_while_the_step_before_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def watched(tokens: torch.Tensor) -> int:
        threads.append(threading.current_thread().name)
        return digest(tokens)

    monkeypatch.setattr("trainer.data.batches.digest", watched)
    with ReadAhead(Reads(), 2, 2, CPU) as batches:
        batches.micro_batches(0), batches.micro_batches(1), batches.digest(1)
    assert [name.startswith("read-ahead") for name in threads] == [True, True]


def test_an_error_of_the_reader_reaches_the_step_that_needs_the_batch() -> None:
    with ReadAhead(Reads(broken=2), 9, 2, CPU) as batches:
        assert [step_of(batches.micro_batches(step)) for step in (0, 1)] == [0, 1]
        with pytest.raises(OSError, match="step 2 cannot be read"):
            batches.micro_batches(2)


@pytest.mark.parametrize("leave_by", [None, RuntimeError])
def test_the_thread_ends_with_the_loop(leave_by: type[Exception] | None) -> None:
    read = Reads()
    try:
        with ReadAhead(read, 9, 2, CPU) as batches:
            batches.micro_batches(0)
            assert read.thread is not threading.current_thread() and read.thread.is_alive()
            if leave_by is not None:
                raise leave_by
    except RuntimeError:
        pass
    assert not read.thread.is_alive()


# ----------------------------------------------------------------------------------------------------------- held-out


@pytest.mark.parametrize("max_sequences", [None, 1, 6, 37, 1000])
@pytest.mark.parametrize(
    ("micro", "data", "pipeline"), [(1, 1, 1), (4, 1, 1), (2, 3, 1), (1, 4, 2), (3, 2, 4), (12, 1, 3)]
)
def test_heldout_batches_cover_each_window_once(
    counting_heldout: HeldoutReader, micro: int, data: int, pipeline: int, max_sequences: int | None
) -> None:
    config = config_of(24, micro, data, parallel={"pipeline": pipeline}, evaluation={"max_sequences": max_sequences})
    per_rank = [heldout_micro_batches(counting_heldout, config, rank, CPU) for rank in range(data)]
    (num_batches,) = {len(batches) for batches in per_rank}
    assert num_batches % pipeline == 0  # what the interleaved schedule needs
    expected = min(37, max_sequences or 37)
    assert num_batches * micro * data < expected + micro * data * pipeline  # no round more than needed
    batches = [batch for mine in per_rank for batch in mine]
    weights = torch.cat([batch.weight for batch in batches if batch.weight is not None])
    numbers = torch.tensor(window_numbers(batches))
    assert weights.dtype == torch.float32 and set(weights.tolist()) <= {0.0, 1.0}
    assert {batch.tokens.shape[0] for batch in batches} == {micro}
    assert numbers[weights == 1].sort().values.tolist() == heldout_windows(counting_heldout, config).tolist()


def test_heldout_windows_are_all_or_a_draw_from_all_over(counting_heldout: HeldoutReader) -> None:
    def windows(max_sequences: int | None, **changes: int) -> list[int]:
        return heldout_windows(
            counting_heldout, config_of(evaluation={"max_sequences": max_sequences}, **changes)
        ).tolist()

    assert windows(None) == windows(37) == windows(1000) == list(range(37))
    for count in (1, 6, 20, 36):
        drawn = windows(count)
        assert len(set(drawn)) == count and drawn == sorted(drawn) and set(drawn) <= set(range(37))
        assert drawn == windows(count, seed=99, global_batch=16, micro=2, data=2)  # the data alone decide
        assert set(drawn) < set(windows(count + 1))  # more sequences only add to the measure
    assert min(windows(20)) < 12 and max(windows(20)) > 24


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
def test_reads_what_megatron_wrote(dtype: Any, tmp_path: Path) -> None:
    documents = [[5, 100, 7], [1], [2, 3, 4, 5, 6, 127], [0, 9]]
    reader = WindowReader(write_megatron(tmp_path / "a.b", documents, dtype), 3)
    flat = np.concatenate(documents)
    assert reader.shard.mapped().dtype == dtype and np.array_equal(reader.shard.mapped(), flat)
    assert reader.num_windows == 3
    assert reader.windows([2, 0]).tolist() == [flat[6:10].tolist(), flat[0:4].tolist()]


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_reads_what_the_data_pipeline_wrote(vocab_size: int, tmp_path: Path) -> None:
    top = vocab_size - 1
    with ShardWriter(tmp_path / "train", vocab_size, end_of_text_id=top) as writer:
        writer.add(TokenBatch.of([np.array(tokens, token_dtype(vocab_size)) for tokens in ([1, 2, 3], [], [4])]))
        writer.add(TokenBatch.of([np.array([5, 6], token_dtype(vocab_size))]))
        writer.finish()
        writer.commit()
    reader = WindowReader(tmp_path / "train", 4)
    assert reader.shard.mapped().tolist() == [1, 2, 3, top, top, 4, top, 5, 6, top]
    assert reader.windows([0, 1]).tolist() == [[1, 2, 3, top, top], [top, 4, top, 5, 6]]


@pytest.mark.parametrize(("num_tokens", "num_windows"), [(SEQ + 1, 1), (2 * SEQ, 1), (2 * SEQ + 1, 2)])
def test_number_of_windows(num_tokens: int, num_windows: int, tmp_path: Path) -> None:
    reader = WindowReader(write_megatron(tmp_path / "train", [list(range(num_tokens))]), SEQ)
    assert reader.num_windows == num_windows
    assert reader.windows([num_windows - 1])[0, -1] == num_windows * SEQ


def test_less_than_a_window(tmp_path: Path) -> None:
    folder = PreparedFolder.open(tmp_path)
    for name in ("train", "heldout"):
        write_megatron(tmp_path / name, [list(range(SEQ))])
    assert WindowReader(tmp_path / "train", SEQ).num_windows == 0
    with pytest.raises(UserError, match=r"text holds 5 training tokens, .* 5 \+ 1; add text or shorten the sequence$"):
        TrainingData.open(folder, config_of())
    with pytest.raises(UserError, match=r"the longest has 5 tokens and model\.seq_length 5 \+ 1 are needed; raise"):
        HeldoutReader(folder, SEQ)


def edited(content: bytes, offset: int, new: bytes) -> bytes:
    return content[:offset] + new + content[offset + len(new) :]


def test_damaged_data_set(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "train", [[1, 2, 3], [4, 5, 6, 7, 8]])
    idx, bin_ = (Path(f"{prefix}{suffix}").read_bytes() for suffix in (".idx", ".bin"))
    WindowReader(prefix, SEQ)
    damages: dict[str, tuple[bytes, bytes]] = {
        "is not a Megatron index; prepare": (edited(idx, 0, b"X"), bin_),
        "is not a Megatron index, or cut off; prepare": (idx[:20], bin_),
        "states the unknown token type 6; prepare": (edited(idx, 17, b"\x06"), bin_),
        "has 28 bytes and": (idx, bin_[:-4]),
        "has 31 bytes and": (idx, bin_[:-1]),
        "has 36 bytes and": (idx, bin_ + bin_[:4]),
        "states 22; prepare": (edited(idx, 17, b"\x08"), bin_),  # uint16 in place of int32
        "has 0 bytes and": (idx, b""),
    }
    for message, (damaged_idx, damaged_bin) in damages.items():
        Path(f"{prefix}.idx").write_bytes(damaged_idx)
        Path(f"{prefix}.bin").write_bytes(damaged_bin)
        with pytest.raises(UserError) as caught:
            WindowReader(prefix, SEQ)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [*range(0, 34, 3), 35, 41, 50, 57])
def test_index_cut_off_anywhere(length: int, tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "train", [[1, 2, 3], [4, 5, 6, 7, 8]])
    idx = Path(f"{prefix}.idx")
    idx.write_bytes(idx.read_bytes()[:length])
    with pytest.raises(UserError, match="is not a Megatron index, or cut off"):
        WindowReader(prefix, SEQ)


def test_data_set_without_a_document(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"")
    (tmp_path / "train.idx").write_bytes(b"MMIDIDX\x00\x00" + struct.pack("<QBQQq", 1, 4, 0, 1, 0))
    reader = WindowReader(tmp_path / "train", SEQ)
    assert (reader.shard.num_tokens, reader.num_windows) == (0, 0)


def test_shard_cut_off_while_it_is_open(tmp_path: Path) -> None:
    reader = WindowReader(write_megatron(tmp_path / "train", [list(range(3 * SEQ + 1))]), SEQ)
    os.truncate(tmp_path / "train.bin", 4 * 2 * SEQ)
    assert reader.windows([0])[0].tolist() == list(range(SEQ + 1))
    for window in (1, 2):
        with pytest.raises(UserError, match=r"train\.bin has been cut off since it was opened; prepare the data again"):
            reader.windows([window])


def test_a_shard_is_closed_with_its_reader(tmp_path: Path) -> None:
    write_megatron(tmp_path / "train", [list(range(20))])
    before = len(os.listdir("/proc/self/fd"))
    readers = [WindowReader(tmp_path / "train", SEQ) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del readers
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_absent_file(suffix: str, tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "train", [list(range(20))])
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(UserError, match=rf"No such file or directory: .*train\.{suffix}; prepare it first"):
        WindowReader(prefix, SEQ)
