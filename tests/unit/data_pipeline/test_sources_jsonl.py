"""Lines: the same from any cut of the file, and what is wrong with them."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.document import Document
from data_pipeline.sources import read_split
from data_pipeline.sources.streams import LineRange
from data_pipeline.tally import KEPT_PLACES, Tally
from peak_memory import peak_growth_mb
from read_sources import counts, places, plan, read, texts

LINES = st.lists(st.sampled_from([b"", b"a", b"bc\r", b"0123456789", b"x" * 40, b"\r", "é".encode()]), max_size=12)


@given(lines=LINES, has_final_newline=st.booleans(), range_bytes=st.integers(1, 60), block_bytes=st.integers(1, 50))
def test_ranges_of_any_size_hold_every_line_once(
    lines: list[bytes], has_final_newline: bool, range_bytes: int, block_bytes: int
) -> None:
    data = b"\n".join(lines) + (b"\n" if has_final_newline else b"")
    whole = io.BytesIO(data).readlines()  # an independent reader
    starts = [sum(map(len, whole[:i])) for i in range(len(whole))]
    for start in range(0, len(data), range_bytes):
        end = min(start + range_bytes, len(data))
        stream = LineRange(ShortReads(data, block_bytes), start, end, lambda num_bytes: None)
        first = stream.offset
        got = b"".join(iter(stream.read, b""))
        expected = [line for line, at in zip(whole, starts, strict=True) if start <= at < end]
        assert got == b"".join(expected)
        assert stream.offset == first + len(got)
        if expected:
            assert first == min(at for at in starts if at >= start)


class ShortReads(io.BytesIO):
    """Gives less than it is asked for, as files behind a network do."""

    def __init__(self, data: bytes, block_bytes: int) -> None:
        super().__init__(data)
        self._block_bytes = block_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._block_bytes)


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("has_final_newline", [True, False])
def test_documents_are_the_same_for_every_size_of_split(
    separator: bytes, has_final_newline: bool, tmp_path: Path
) -> None:
    expected = [f"{i} " + "é" * (i % 7) for i in range(40)]
    data = separator.join(json.dumps({"text": text}).encode() for text in expected)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data + (separator if has_final_newline else b""))
    whole, _ = read(path)
    assert texts(whole) == expected
    for document in whole:
        offset = int(document.id.rpartition("@")[2])
        assert json.loads(path.read_bytes()[offset:].splitlines()[0])["text"] == document.text
    for split_bytes in (1, 7, 64, len(data) - 1, len(data), len(data) + 1):
        assert read(path, split_bytes=split_bytes) == (whole, Tally())


def test_every_unusable_line_is_counted_by_reason_and_place(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "kept, after a byte-order mark"}',
        b'{"text": "torn',
        b"",
        b'["not", "an", "object"]',
        b'{"body": "no such field"}',
        b'{"text": 17}',
        b'{"text": null}',
        b"[" * 5000,
        b'{"text": "\x00"}',
        '{"text": "größer"}'.encode("utf-16"),
        b" \t ",
        b'{"text": "kept too"}',
    ]
    path = tmp_path / "messy.jsonl"
    path.write_bytes(b"\n".join(lines))
    at = {i: f"{path}@{sum(map(len, lines[:i])) + i}" for i in range(len(lines))}
    documents, tally = read(path)
    assert documents == [Document(at[0], "kept, after a byte-order mark"), Document(at[11], "kept too")]
    assert places(tally) == {
        "bad_json": [at[1], at[3], at[7]],
        "missing_field": [at[4]],
        "field_not_text": [at[5], at[6]],
        "undecodable": [at[8], at[9]],
    }


def test_the_text_field_is_configurable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "words", "text": "other"}')
    assert texts(read(tmp_path, text_field="body")[0]) == ["words"]


def test_broken_utf8_and_escaped_surrogates_are_kept_for_repair_and_other_encodings_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "%s caf\xe9"}\n{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude42"}\n' % (b"x" * 100)
        + '{"text": "Größe größer"}\n'.encode("latin-1")
    )
    documents, tally = read(path)
    assert texts(documents) == ["x" * 100 + " caf\ufffd", "half \ud83d", "whole \U0001f642"]
    assert counts(tally) == {"undecodable": 1}
    assert tally.repaired["broken_utf8"].places == [f"{path}@0"]


def test_places_are_bounded_and_counts_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * (10 * KEPT_PLACES))
    _, tally = read(tmp_path)
    assert counts(tally) == {"bad_json": 10 * KEPT_PLACES}
    assert len(tally.dropped["bad_json"].places) == KEPT_PLACES


def test_an_empty_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}')
    assert places(read(tmp_path)[1]) == {"empty_file": [f"{tmp_path}/a.jsonl"]}


def test_texts_and_lines_over_the_limit_are_counted_and_their_neighbours_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    korean = "가" * 34  # 102 bytes
    lines = [{"text": "before"}, {"text": "x" * 100}, {"text": "x" * 101}, {"text": korean}, {"text": "y" * 3_000_000}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "after"}]), encoding="utf-8")
    documents, tally = read(path, max_document_bytes=100)
    assert texts(documents) == ["before", "x" * 100, "after"]
    assert counts(tally) == {"too_long": 3}
    assert tally.samples["too_long"][0][1] == "x" * 101
    for split_bytes in (1000, 1_000_000, 2_999_999):
        assert read(path, max_document_bytes=100, split_bytes=split_bytes) == (documents, tally)


def test_a_long_line_never_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as handle:
        handle.write(b'{"text": "before"}\n{"text": "')
        for _ in range(256):
            handle.write(b"x" * (1 << 20))
        handle.write(b'"}\n{"text": "after"}\n')
    (first, *_, last) = plan(path).splits
    assert peak_growth_mb(lambda: list(read_split(first, 1 << 20, Tally()))) < 24
    tally = Tally()
    assert texts(list(read_split(first, 1 << 20, tally))) == ["before"]
    assert places(tally) == {"too_long": [f"{path}@19"]}
    assert texts(list(read_split(last, 1 << 20, tally))) == ["after"]


def test_the_measure_of_memory_sees_it() -> None:
    assert 60 < peak_growth_mb(lambda: b"x" * (64 << 20)) < 100
