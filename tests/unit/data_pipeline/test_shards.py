"""The shards are read back with megatron-core's own reader, which shares no code with the writer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_pipeline.shards import ShardWriter, token_dtype

END_OF_TEXT_ID = 7
DOCUMENTS = st.lists(st.lists(st.integers(0, 65499), max_size=20), min_size=1, max_size=12)


def write(prefix: Path, batches: list[list[list[int]]], vocab_size: int) -> ShardWriter:
    writer = ShardWriter(prefix, vocab_size, END_OF_TEXT_ID)
    for batch in batches:
        writer.add([np.array(tokens, dtype=token_dtype(vocab_size)) for tokens in batch])
    writer.finish()
    writer.commit()
    return writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@given(documents=DOCUMENTS, vocab_size=st.sampled_from([65499, 65500]), cut=st.integers(0, 12))
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
def test_bytes_are_those_of_megatrons_own_writer(vocab_size: int, tmp_path: Path) -> None:
    documents = [[1, 2, 3], [], [999] * 50]
    write(tmp_path / "ours", [documents], vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_dtype(vocab_size).type)
    for tokens in documents:
        builder.add_document(np.array([*tokens, END_OF_TEXT_ID]), [len(tokens) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()


def test_nothing_is_visible_before_commit_and_nothing_remains_after_discard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", 1000, END_OF_TEXT_ID)
    writer.add([np.array([1, 2], dtype=np.uint16)])
    writer.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin.tmp", "train.idx.tmp"}
    writer.discard()
    assert not list(tmp_path.iterdir())


def test_discard_after_commit_keeps_the_shard(tmp_path: Path) -> None:
    write(tmp_path / "train", [[[1]]], 1000).discard()
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "train.idx"}


def test_tokens_of_a_wider_type_are_refused_rather_than_cut(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", 1000, END_OF_TEXT_ID)
    with pytest.raises(TypeError):
        writer.add([np.array([70_000], dtype=np.int32)])
    writer.discard()
