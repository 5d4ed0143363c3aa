"""Finding files, cutting them into splits, and the splits' names."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from data_pipeline.sources import PYTHON_STDLIB, Split, UnreadableSplit, content_hash, origin, plan_splits, read_split
from data_pipeline.sources.find import find_files
from data_pipeline.tally import Tally
from read_sources import counts, places, plan, read, texts
from trainer.config import UserError
from trainer.data_config import DataConfig


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or (orjson.dumps({"text": path.name}) if "json" in path.name else path.name.encode()))
    return path


def ids(splits: tuple[Split, ...]) -> list[str]:
    return [split.id for split in splits]


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.ndjson", "a/deep/c.jsonl", "a/deep/d.json", "a/ignored.md", "a/.txt"):
        write(tmp_path / name)
    documents, tally = read(tmp_path)
    assert [document.id for document in documents] == [
        f"{tmp_path}/a/deep/c.jsonl@0",
        f"{tmp_path}/a/deep/d.json@0",
        f"{tmp_path}/a/z.ndjson@0",
        f"{tmp_path}/b.txt",
    ]
    assert texts(documents) == ["c.jsonl", "d.json", "z.ndjson", "b.txt"]
    assert not tally.dropped
    assert plan(tmp_path).notes[0].startswith(f"{tmp_path}: 2 files end neither in .jsonl")


def test_globs_files_and_folders_name_each_file_once(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt", "three.jsonl"):
        write(tmp_path / name)
    documents, _ = read(tmp_path / "t*", tmp_path / "one.txt", f"file://{tmp_path}")
    assert texts(documents) == ["three.jsonl", "two.txt", "one.txt"]


def test_of_a_file_in_two_data_sets_the_first_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl")
    data = DataConfig.model_validate(
        {"datasets": {"one": {"sources": str(tmp_path / "a.jsonl")}, "two": {"sources": str(tmp_path)}}}
    )
    splits = plan_splits(data).splits
    assert [(split.dataset, split.name) for split in splits] == [("one", "a.jsonl"), ("two", "b.jsonl")]


def test_recursive_globs_and_names_with_brackets(tmp_path: Path) -> None:
    write(tmp_path / "deep/er/a.txt")
    write(tmp_path / "b[1].txt")
    assert texts(read(f"{tmp_path}/**/*.txt")[0]) == ["b[1].txt", "a.txt"]
    assert texts(read(tmp_path / "b[1].txt")[0]) == ["b[1].txt"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/a.txt")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "other").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    assert [document.id for document in read(corpus)[0]] == [f"{corpus}/link/a.txt"]
    assert [file.name for file in find_files(str(corpus), "data.sources")[0]] == ["link/a.txt"]


def test_a_relative_source_keeps_its_name_and_can_be_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "corpus/a.txt")
    write(tmp_path / "corpus/b/c.txt")
    monkeypatch.chdir(tmp_path)
    splits = plan("corpus", "corpus/a.txt").splits
    monkeypatch.chdir("/")
    documents = [document for split in splits for document in read_split(split, 1000, Tally())]
    assert [document.id for document in documents] == ["corpus/a.txt", "corpus/b/c.txt"]


def test_a_name_that_is_no_unicode_is_readable_and_its_id_is_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"text")
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(b'{"text": "line"}')
    assert [document.id for document in read(tmp_path)[0]] == [
        f"{tmp_path}/caf\ufffd.jsonl@0",
        f"{tmp_path}/caf\ufffd.txt",
    ]


def test_small_texts_share_a_split_and_lines_are_cut_by_bytes(tmp_path: Path) -> None:
    for i in range(25):
        write(tmp_path / f"{i:02}.txt", b"x" * 100)
        write(tmp_path / f"{i:02}.jsonl", b'{"text": "x"}')
    write(tmp_path / "long.jsonl", b'{"text": "x"}\n' * 100)
    splits = plan(tmp_path, split_bytes=1000).splits
    assert [(split.name, len(split.members)) for split in splits if split.format == "text"] == [
        ("00.txt", 10),
        ("10.txt", 10),
        ("20.txt", 5),
    ]
    assert [(split.start, split.end) for split in splits if split.name == "long.jsonl"] == [(0, 700), (700, 1400)]
    assert all(pickle.loads(pickle.dumps(split)) == split for split in splits)
    assert len(read(tmp_path, split_bytes=1000)[0]) == 150


def test_ids_name_what_is_held_and_not_where_or_when(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name in ("a.jsonl", "b.txt", "deep/c.jsonl.gz", "big.jsonl"):
        write(corpus / name, b'{"text": "x"}\n' * 50_000 if name == "big.jsonl" else b"")
    before = plan(corpus).splits
    assert len(set(ids(before))) == 4
    shutil.copytree(corpus, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere/a.jsonl", ns=(5, 5))
    after = plan(tmp_path / "elsewhere").splits
    assert ids(after) == ids(before)
    assert [split.modified_ns for split in after if split.name == "a.jsonl"] == [5]
    assert ids(plan(f"{corpus}/**/*.*").splits) == ids(before)

    assert not set(ids(plan(corpus, text_field="body").splits)) & set(ids(before))
    with open(corpus / "big.jsonl", "r+b") as handle:  # the same size, and another byte in the middle
        handle.seek(os.path.getsize(corpus / "big.jsonl") // 2 + 5)
        handle.write(b"y")
    changed = plan(corpus).splits
    assert [old.name for old, new in zip(before, changed, strict=True) if old.id != new.id] == ["big.jsonl"]


def test_two_copies_of_a_file_are_two_splits(tmp_path: Path) -> None:
    write(tmp_path / "one/a.jsonl")
    write(tmp_path / "two/a.jsonl")
    first, second = plan(tmp_path / "one", tmp_path / "two").splits
    assert first.id != second.id
    assert first.fingerprint == second.fingerprint


def test_the_hash_of_content_sees_every_byte_of_the_splits_lines_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"".join(b'{"text": "%06d"}\n' % i for i in range(100)))
    splits = plan(path, split_bytes=700).splits
    before = [content_hash(split) for split in splits]
    assert len(set(before)) == len(splits)
    with open(path, "r+b") as handle:
        handle.seek(640)  # in the line that begins in the first range and ends in the second
        handle.write(b"9")
    after = [content_hash(split) for split in splits]
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, *[False] * (len(splits) - 1)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.wet"])
def test_the_hash_of_content_covers_whole_files(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, b"x" * 3_000_000)
    (split,) = plan(path).splits
    before = content_hash(split)
    assert content_hash(split) == before
    path.write_bytes(b"x" * 2_345_678 + b"y" + b"x" * 654_321)
    assert content_hash(split) != before


def test_messages_name_the_data_set_where_there_are_several(tmp_path: Path) -> None:
    data = DataConfig.model_validate({"datasets": {"web": {"sources": str(tmp_path / "gone")}}})
    with pytest.raises(UserError, match=r"^data\.datasets\.web\.sources: .*gone does not exist"):
        plan_splits(data)


def make_missing(folder: Path) -> Path:
    return folder / "nowhere"


def make_unmatched_glob(folder: Path) -> Path:
    return folder / "*.txt"


def make_empty_folder(folder: Path) -> Path:
    return folder


def make_other_kind(folder: Path) -> Path:
    return write(folder / "a.pdf", b"%PDF")


def make_folder_of_other_kinds(folder: Path) -> Path:
    return make_other_kind(folder).parent


def make_empty_file(folder: Path) -> Path:
    (folder / "a.txt").touch()
    return folder


def make_dangling_link(folder: Path) -> Path:
    (folder / "link.txt").symlink_to(folder / "gone")
    return folder


def make_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.txt")
    return folder / "pipe.txt"


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (make_missing, "nowhere does not exist"),
        (make_unmatched_glob, "does not exist"),
        (make_empty_folder, "holds no file that ends in .jsonl"),
        (make_other_kind, "ends neither in .jsonl"),
        (make_folder_of_other_kinds, "holds no file that ends in .jsonl"),
        (make_empty_file, "is empty (0 bytes in 1 files)"),
        (make_dangling_link, "nothing can be read"),
        (make_pipe, "not a regular file"),
    ],
)
def test_planning_refuses_missing_empty_and_unreadable_sources(
    make: Callable[[Path], Path], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        plan(make(tmp_path))
    assert rule in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("make", [make_dangling_link, make_pipe])
def test_an_unreadable_file_beside_others_is_a_split_that_fails(make: Callable[[Path], Path], tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path / "good.txt")
    made = plan(tmp_path)
    assert "1 files cannot be read" in made.notes[0]
    good, bad = sorted(made.splits, key=lambda split: split.problem)
    assert texts(list(read_split(good, 1000, Tally()))) == ["good.txt"]
    tally = Tally()
    with pytest.raises(UnreadableSplit, match=r"\.txt: (No such file|it is not a regular file)"):
        list(read_split(bad, 1000, tally))
    assert places(tally) == {"unreadable": [bad.place]}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_vanishes_fails_its_split(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, b"x" * 100)
    (split,) = plan(tmp_path).splits
    path.unlink()
    tally = Tally()
    with pytest.raises(UnreadableSplit, match=split.problem or "No such file"):  # a bad footer is seen by the plan
        list(read_split(split, 1000, tally))
    assert counts(tally) == {"unreadable": 1}


def test_a_file_that_grew_since_the_plan_fails_its_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    (split,) = plan(path).splits
    write(path, b'{"text": "another, longer line"}')
    with pytest.raises(UnreadableSplit, match="had 18 when it was planned; run again"):
        list(read_split(split, 1000, Tally()))
    assert texts(list(read_split(replace(split, file_bytes=32, end=32), 1000, Tally()))) == ["another, longer line"]


def test_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert origin("corpus") == f"{tmp_path}/corpus"
    assert origin("s3://bucket/x") == "s3://bucket/x"
    assert origin("hf:name") == "hf:name"
    assert origin(PYTHON_STDLIB).startswith("standard library of Python 3.")
