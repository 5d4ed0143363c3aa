"""Parquet files, against pyarrow's writer, and Hugging Face data sets on this machine."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources import UnreadableSplit, content_hash, read_split
from data_pipeline.sources.hugging_face import HubName, parse_name
from data_pipeline.tally import Tally
from peak_memory import peak_growth_mb
from read_sources import counts, places, plan, read, texts
from trainer.config import UserError

TEXTS = [f"text {i} " + "é" * (i % 9) for i in range(1000)]


def write_parquet(path: Path, column: object, **options: object) -> Path:
    pq.write_table(pa.table({"id": range(len(column)), "text": column}), path, **options)
    return path


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_rows_round_trip_for_every_size_of_split(kind: pa.DataType, compression: str, tmp_path: Path) -> None:
    column = pa.array(TEXTS).cast(kind)
    path = write_parquet(tmp_path / "a.parquet", column, row_group_size=70, compression=compression)
    documents, tally = read(path)
    assert texts(documents) == TEXTS
    assert documents[17].id == f"{path}:17"
    assert not tally.dropped
    assert len(plan(path, split_bytes=1).splits) == 15
    assert len(plan(path).splits) == 1
    for split_bytes in (1, 3000):
        assert read(path, split_bytes=split_bytes) == (documents, tally)


def test_nulls_other_types_and_missing_columns_are_counted(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(["x", None, "y"]))
    documents, tally = read(path)
    assert texts(documents) == ["x", "y"]
    assert places(tally) == {"field_not_text": [f"{path}:1"]}
    assert counts(read(path, text_field="id")[1]) == {"field_not_text": 3}
    assert counts(read(path, text_field="body")[1]) == {"missing_field": 3}
    write_parquet(tmp_path / "b.parquet", pa.array([], pa.string()))
    assert counts(read(tmp_path)[1]) == {"field_not_text": 1, "empty_file": 1}


def test_strings_that_are_not_utf8_are_repaired_or_dropped(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"x" * 200 + b"\xff", "größer".encode("latin-1")], pa.binary())
    column = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    path = write_parquet(tmp_path / "a.parquet", column)
    documents, tally = read(path)
    assert texts(documents) == ["good", "x" * 200 + "\ufffd"]
    assert places(tally) == {"undecodable": [f"{path}:2"]}
    assert tally.repaired["broken_utf8"].places == [f"{path}:1"]


def test_a_damaged_row_group_costs_no_other_and_a_lost_file_is_no_split(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS), row_group_size=100, use_dictionary=False)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(3).column(1)
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(data)
    documents, tally = read(path)
    assert texts(documents) == TEXTS[:300] + TEXTS[400:]
    assert places(tally) == {"bad_record": [f"{path}:300"]}
    with pytest.raises(UnreadableSplit):
        list(read_split(plan(path, split_bytes=1).splits[3], 1000, Tally()))

    path.write_bytes(data[:-50])
    write_parquet(tmp_path / "b.parquet", pa.array(["x"]))
    made = plan(tmp_path)
    assert [bool(split.problem) for split in made.splits] == [True, False]
    assert f"{path} is a bad split" in made.notes[0]


def test_the_hash_of_content_is_of_the_splits_own_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS), row_group_size=100, use_dictionary=False)
    splits = plan(path, split_bytes=1).splits
    before = [content_hash(split) for split in splits]
    column = pq.ParquetFile(path).metadata.row_group(3).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    changed = [old != new for old, new in zip(before, map(content_hash, splits), strict=True)]
    assert changed == [i == 3 for i in range(10)]


def test_large_rows_are_decoded_few_at_a_time(tmp_path: Path) -> None:
    column = pa.array([chr(97 + i % 20) * 1_000_000 for i in range(100)])
    options = {"use_dictionary": False, "write_batch_size": 1, "data_page_size": 1 << 20}  # pages of a row each
    (split,) = plan(write_parquet(tmp_path / "a.parquet", column, **options)).splits

    def read_through() -> None:
        assert sum(1 for _ in read_split(split, 1_000_000, Tally())) == 100

    assert peak_growth_mb(read_through) < 40


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """In the layout of a data set of the hub: two shards of training and one of test."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for part in range(2):
        write_parquet(folder / f"train-{part:05}-of-00002.parquet", pa.array(TEXTS[part * 500 : (part + 1) * 500]))
    write_parquet(folder / "test-00000-of-00001.parquet", pa.array(["for tests", None]))
    return folder


def test_data_sets_are_read_by_their_own_shards(hub_folder: Path, tmp_path: Path) -> None:
    source = f"hf:{hub_folder}"
    documents, tally = read(source)
    assert texts(documents) == TEXTS
    assert documents[502].id == f"{source}:1:2"
    assert not tally.dropped
    before = plan(source).splits
    assert len(before) == 2
    assert [split.size_bytes for split in before] == [
        (hub_folder / f"train-{part:05}-of-00002.parquet").stat().st_size for part in range(2)
    ]
    documents, tally = read(f"{source}#test")
    assert texts(documents) == ["for tests"]
    assert places(tally) == {"field_not_text": [f"{source}#test:0:1"]}

    (tmp_path / "moved").mkdir()
    moved = plan(f"hf:{shutil.move(hub_folder, tmp_path / 'moved/hub')}").splits
    assert [split.id for split in moved] == [split.id for split in before]
    assert content_hash(moved[0]) != content_hash(moved[1])


def test_data_sets_that_cannot_be_read_are_refused(hub_folder: Path) -> None:
    with pytest.raises(UserError, match="has no field body; set text_field to one of id, text"):
        plan(f"hf:{hub_folder}", text_field="body")
    with pytest.raises(UserError, match=r"cannot be loaded .*validation.*check its name and split"):
        plan(f"hf:{hub_folder}#validation")
    with pytest.raises(UserError, match="cannot be loaded"):
        plan(f"hf:{hub_folder}/nowhere")


def test_a_file_of_lines_works_the_same_and_fails_its_split_where_the_library_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    assert texts(read(f"hf:{path}")[0]) == TEXTS
    path.write_text('{"text": "x"}\n{"text": "half \\ud83d"}\n', encoding="utf-8")
    (split,) = plan(f"hf:{path}").splits
    with pytest.raises(UnreadableSplit, match="without hf:, reads around bad records"):
        list(read_split(split, 1000, Tally()))
    assert texts(read(path)[0]) == ["x", "half \ud83d"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:allenai/c4@en#validation", HubName("allenai/c4", "en", "validation")),
        ("hf:allenai/c4@en", HubName("allenai/c4", "en", "train")),
        ("hf:imdb#test", HubName("imdb", None, "test")),
        ("hf:imdb", HubName("imdb", None, "train")),
    ],
)
def test_names_of_data_sets(source: str, parts: HubName) -> None:
    assert parse_name(source) == parts


def test_a_local_folder_with_signs_in_its_name_wins(tmp_path: Path) -> None:
    folder = tmp_path / "a@b#c"
    folder.mkdir()
    assert parse_name(f"hf:{folder}") == HubName(str(folder), None, "train")
    assert parse_name(f"hf:{folder}#test") == HubName(str(folder), None, "test")
