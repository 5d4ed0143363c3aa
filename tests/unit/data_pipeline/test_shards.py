"""The shards are read back with megatron-core's own reader, which shares no code with the writer."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_pipeline import shards
from data_pipeline.shards import ShardWriter, TokenBatch, append_ranges, read_lengths, token_dtype, write_index
from trainer.config import UserError

END_OF_TEXT_ID = 7
DOCUMENTS = st.lists(st.lists(st.integers(0, 65499), max_size=20), max_size=12)


def batch_of(documents: Sequence[Sequence[int]], vocab_size: int) -> TokenBatch:
    ids = np.array([token for tokens in documents for token in tokens], dtype=token_dtype(vocab_size))
    return TokenBatch(ids, np.array([len(tokens) for tokens in documents], dtype=np.int32))


def write(prefix: Path, batches: list[list[list[int]]], vocab_size: int) -> ShardWriter:
    writer = ShardWriter(prefix, vocab_size, END_OF_TEXT_ID)
    for documents in batches:
        writer.add(batch_of(documents, vocab_size))
    writer.finish()
    writer.commit()
    return writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@given(documents=DOCUMENTS, vocab_size=st.sampled_from([65499, 65500]))
def test_a_batch_is_split_and_ended_document_by_document(documents: list[list[int]], vocab_size: int) -> None:
    batch = batch_of(documents, vocab_size)
    assert [tokens.tolist() for tokens in batch.documents()] == documents
    ended = batch.ended_by(END_OF_TEXT_ID)
    assert [tokens.tolist() for tokens in ended.documents()] == [[*tokens, END_OF_TEXT_ID] for tokens in documents]
    assert ended.ids.dtype == batch.ids.dtype
    assert ended.lengths.dtype == np.int32


@given(documents=DOCUMENTS.filter(len), vocab_size=st.sampled_from([65499, 65500]), cut=st.integers(0, 12))
def test_megatron_reads_every_document_with_its_end_of_text(
    folder: Path, documents: list[list[int]], vocab_size: int, cut: int
) -> None:
    writer = write(folder / "train", [documents[:cut], documents[cut:]], vocab_size)
    dataset = IndexedDataset(str(folder / "train"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[*tokens, END_OF_TEXT_ID] for tokens in documents]
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    assert dataset.index.dtype == (np.uint16 if vocab_size < 65500 else np.int32)
    assert writer.num_documents == len(documents)
    assert writer.num_tokens == sum(map(len, documents)) + len(documents) == dataset.sequence_lengths.sum()


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
@pytest.mark.parametrize("documents", [[[1, 2, 3], [], [999] * 50], []], ids=["three", "none"])
def test_bytes_are_those_of_megatrons_own_writer(vocab_size: int, documents: list[list[int]], tmp_path: Path) -> None:
    write(tmp_path / "ours", [documents], vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_dtype(vocab_size).type)
    for tokens in documents:
        builder.add_document(np.array([*tokens, END_OF_TEXT_ID]), [len(tokens) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()


def test_nothing_is_visible_before_commit_and_nothing_remains_after_discard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", 1000, END_OF_TEXT_ID)
    writer.add(batch_of([[1, 2]], 1000))
    writer.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin.tmp", "train.idx.tmp"}
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_discard_before_finish_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train", 1000, END_OF_TEXT_ID) as writer:
        writer.add(batch_of([[1, 2]], 1000))
    assert not list(tmp_path.iterdir())


def test_discard_after_commit_keeps_the_shard(tmp_path: Path) -> None:
    write(tmp_path / "train", [[[1]]], 1000).discard()
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "train.idx"}


def test_tokens_of_another_type_are_refused_rather_than_cut(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train", 1000, END_OF_TEXT_ID) as writer, pytest.raises(TypeError, match="uint16"):
        writer.add(batch_of([[70_000]], 100_000))


def test_a_document_too_long_for_the_index_is_refused() -> None:
    no_ids = np.zeros(0, np.uint16)
    TokenBatch.of_counts(no_ids, np.array([3, 2**31 - 2]))
    with pytest.raises(UserError, match=r"a document has 2147483647 tokens, .* lower data.max_document_bytes"):
        TokenBatch.of_counts(no_ids, np.array([3, 2**31 - 1]))
    with pytest.raises(UserError, match=r"lower data.max_document_bytes"):
        TokenBatch(no_ids, np.array([2**31 - 1], dtype=np.int32)).ended_by(END_OF_TEXT_ID)


@pytest.mark.parametrize("block_documents", [1, 3, 1 << 17])
def test_an_index_from_files_of_lengths_is_that_of_the_whole(
    block_documents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_BLOCK_DOCUMENTS", block_documents)
    lengths = np.random.default_rng(0).integers(1, 50, size=1000).astype(np.int32)
    write(tmp_path / "whole", [[[1] * (length - 1) for length in lengths]], 1000)
    paths = []
    for number, part in enumerate([lengths[:300], lengths[:0], lengths[300:]]):
        paths.append(tmp_path / f"{number}.lengths")
        part.tofile(paths[-1])
    tokens = write_index(tmp_path / "joined.idx", np.dtype(np.uint16), read_lengths(paths), len(lengths))
    assert tokens == lengths.sum()
    assert (tmp_path / "joined.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


def test_offsets_of_a_large_shard_do_not_overflow(tmp_path: Path) -> None:
    lengths = np.full(5, 2**31 - 1, dtype=np.int32)
    assert write_index(tmp_path / "large.idx", np.dtype(np.int32), [lengths], 5) == 5 * (2**31 - 1)
    (tmp_path / "large.bin").touch()
    index = IndexedDataset(str(tmp_path / "large"), mmap=False).index
    assert index.sequence_pointers.tolist() == [4 * (2**31 - 1) * i for i in range(5)]


RANGES = [(0, 10), (10, 20), (20, 20), (35, 90), (50, 60), (0, 3_000_000), (99, 99)]


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    path = folder / "source"
    path.write_bytes(np.random.default_rng(0).bytes(3_000_000))
    return path


def test_ranges_of_a_file_are_appended_in_order(source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    with open(tmp_path / "out", "wb") as out:
        out.write(b"before")
        out.flush()
        for ranges in (RANGES, [], np.array(RANGES)):
            assert append_ranges(out.fileno(), source, ranges) == sum(stop - start for start, stop in ranges)
        out.write(b"after")
    appended = b"".join(content[start:stop] for start, stop in RANGES)
    assert (tmp_path / "out").read_bytes() == b"before" + appended * 2 + b"after"


def test_ranges_are_appended_where_the_kernel_cannot_copy(source: Path) -> None:
    reading, writing = os.pipe()  # copy_file_range refuses a pipe
    with open(reading, "rb") as received:
        assert append_ranges(writing, source, [(5, 1000), (1000, 4000), (8000, 9000)]) == 4995
        os.close(writing)
        content = source.read_bytes()
        assert received.read() == content[5:4000] + content[8000:9000]


def test_a_range_beyond_the_end_of_the_file_is_an_error(source: Path, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out, pytest.raises(EOFError, match="ends at byte 3000000"):
        append_ranges(out.fileno(), source, [(2_999_990, 3_000_001)])


def test_neighbours_are_copied_as_one() -> None:
    coalesced = shards._coalesced(np.array(RANGES))
    assert coalesced.tolist() == [[0, 20], [35, 90], [50, 60], [0, 3_000_000]]
