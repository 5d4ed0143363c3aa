import os
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from data_pipeline.document import Document
from data_pipeline.sources import check_sources, read_documents
from data_pipeline.tally import KEPT_PLACES, Tally
from trainer.config import UserError


def read(*sources: Path | str, text_field: str = "text") -> tuple[list[Document], Tally]:
    tally = Tally()
    return list(read_documents([str(source) for source in sources], text_field, tally)), tally


def counts(tally: Tally) -> dict[str, int]:
    return {reason: count.count for reason, count in tally.dropped.items()}


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/deep/c.jsonl", "a/ignored.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "from jsonl"}\n' if name.endswith("jsonl") else name, encoding="utf-8")
    documents, tally = read(tmp_path)
    assert [document.id for document in documents] == [
        f"{tmp_path}/a/deep/c.jsonl:1",
        f"{tmp_path}/a/z.txt",
        f"{tmp_path}/b.txt",
    ]
    assert [document.text for document in documents] == ["from jsonl", "a/z.txt", "b.txt"]
    assert {document.source for document in documents} == {str(tmp_path)}
    assert not tally.dropped


def test_globs_files_and_folders_name_each_file_once(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt", "three.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}' if name.endswith("jsonl") else name, encoding="utf-8")
    documents, _ = read(tmp_path / "t*", tmp_path / "one.txt", tmp_path)
    assert [Path(document.id).name for document in documents] == ["three.jsonl:1", "two.txt", "one.txt"]


def test_recursive_globs_and_names_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "b[1].txt").write_text("b", encoding="utf-8")
    assert [document.text for document in read(f"{tmp_path}/**/*.txt")[0]] == ["b", "a"]
    assert [document.text for document in read(tmp_path / "b[1].txt")[0]] == ["b"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a", encoding="utf-8")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "other").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    assert [document.id for document in read(corpus)[0]] == [f"{corpus}/link/a.txt"]


def test_every_unusable_line_is_counted_by_reason_and_place(tmp_path: Path) -> None:
    path = tmp_path / "messy.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "kept, after a byte-order mark"}\n'
        b'{"text": "torn\n'
        b"\n"
        b'["not", "an", "object"]\n'
        b'{"body": "no such field"}\n'
        b'{"text": 17}\n'
        b'{"text": null}\n' + b"[" * 5000 + b"\n"
        b'{"text": "kept too"}'
    )
    documents, tally = read(path)
    assert [document.id.rpartition(":")[2] for document in documents] == ["1", "9"]
    assert documents[0].text == "kept, after a byte-order mark"
    assert {reason: count.places for reason, count in tally.dropped.items()} == {
        "bad_json": [f"{path}:2", f"{path}:4", f"{path}:8"],
        "missing_field": [f"{path}:5"],
        "field_not_text": [f"{path}:6", f"{path}:7"],
    }


def test_text_field_is_configurable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "words", "text": "other"}')
    assert read(tmp_path, text_field="body")[0][0].text == "words"


def test_broken_utf8_and_escaped_surrogates_in_jsonl_are_kept_for_repair(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude42"}\n')
    documents, tally = read(path)
    assert [document.text for document in documents] == ["caf\ufffd", "half \ud83d", "whole \U0001f642"]
    assert not tally.dropped
    assert tally.repaired["broken_utf8"].count == 1


def test_files_in_another_encoding_are_dropped_and_damaged_ones_repaired(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(("Größe " * 30).encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "damaged.txt").write_bytes(b"a long and otherwise good text " * 20 + b"\xff")
    documents, tally = read(tmp_path)
    assert [Path(document.id).name for document in documents] == ["damaged.txt"]
    assert tally.dropped["undecodable"].places == [f"{tmp_path}/latin.txt", f"{tmp_path}/wide.txt"]
    assert tally.repaired["broken_utf8"].places == [f"{tmp_path}/damaged.txt"]


def test_a_file_that_vanishes_before_it_is_read_is_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    tally = Tally()
    reading = read_documents([str(tmp_path)], "text", tally)
    assert next(reading).text == "a.txt"
    (tmp_path / "b.txt").unlink()
    assert [document.text for document in reading] == ["c.txt"]
    assert tally.dropped["unreadable"].places == [f"{tmp_path}/b.txt"]


def test_places_are_bounded_and_counts_are_not(tmp_path: Path) -> None:
    num_lines = 10 * KEPT_PLACES
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * num_lines)
    _, tally = read(tmp_path)
    assert counts(tally) == {"bad_json": num_lines}
    assert len(tally.dropped["bad_json"].places) == KEPT_PLACES


def test_check_accepts_a_good_corpus_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(orjson.dumps({"text": "x"}))
    assert check_sources([str(tmp_path)]) == []
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    (note,) = check_sources([str(tmp_path)])
    assert "1 files are neither .txt nor .jsonl" in note


def make_missing(folder: Path) -> Path:
    return folder / "nowhere"


def make_unmatched_glob(folder: Path) -> Path:
    return folder / "*.txt"


def make_empty_folder(folder: Path) -> Path:
    return folder


def make_other_kind(folder: Path) -> Path:
    (folder / "a.pdf").write_bytes(b"%PDF")
    return folder / "a.pdf"


def make_folder_of_other_kinds(folder: Path) -> Path:
    return make_other_kind(folder).parent


def make_empty_file(folder: Path) -> Path:
    (folder / "a.txt").touch()
    return folder


def make_dangling_link(folder: Path) -> Path:
    (folder / "good.txt").write_text("good", encoding="utf-8")
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
        (make_empty_folder, "holds no .txt or .jsonl file"),
        (make_other_kind, "neither .txt nor .jsonl"),
        (make_folder_of_other_kinds, "holds no .txt or .jsonl file"),
        (make_empty_file, "is empty (0 bytes in 1 files)"),
        (make_dangling_link, "link.txt cannot be read"),
        (make_pipe, "not a regular file"),
    ],
)
def test_check_refuses_missing_empty_and_unreadable_corpora(
    make: Callable[[Path], Path], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        check_sources([str(make(tmp_path))])
    assert rule in str(refusal.value)
    assert "\n" not in str(refusal.value)
