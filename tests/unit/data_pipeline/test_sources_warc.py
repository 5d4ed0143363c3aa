"""Common Crawl's archives, against warcio's writer, and records that are damaged or lie."""

import gzip
import io
import time
from pathlib import Path

import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from read_sources import counts, places, read, texts

PAGE = (
    "<html><head><title>t</title><meta charset='{charset}'></head><body><nav><a href='/'>Home</a></nav>"
    "<main><article><p>Größe: a paragraph of the page with enough words to be its main content.</p></article></main>"
    "</body></html>"
)
MAIN_TEXT = "Größe: a paragraph of the page with enough words to be its main content."


def conversions(texts: list[str], *, compressed: bool) -> bytes:
    """A .wet file, a gzip member for each record as Common Crawl has them, or plain."""
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=compressed)
    writer.write_record(writer.create_warcinfo_record("a.wet", {"software": "test"}))
    for i, text in enumerate(texts):
        payload = io.BytesIO(text.encode())
        writer.write_record(
            writer.create_warc_record(
                f"http://a.test/{i}", "conversion", payload=payload, warc_content_type="text/plain"
            )
        )
    return buffer.getvalue()


def responses(pages: list[tuple[bytes, list[tuple[str, str]]]]) -> bytes:
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    for i, (body, headers) in enumerate(pages):
        url, status = f"http://a.test/{i}", StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")
        writer.write_record(writer.create_warc_record(url, "request", payload=io.BytesIO(b"GET / HTTP/1.1\r\n\r\n")))
        writer.write_record(writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=status))
    return buffer.getvalue()


def html(content_type: str = "text/html", *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("Content-Type", content_type), *more]


TEXTS = [f"text {i} " + "é\r\n\r\n" * (i % 5) for i in range(500)] + ["x" * 900_000, ""]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_conversions_round_trip(suffix: str, tmp_path: Path) -> None:
    data = conversions(TEXTS, compressed=suffix == ".gz")
    path = tmp_path / f"a.warc.wet{suffix}"
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if suffix == ".zst" else data)
    documents, tally = read(path)
    assert texts(documents) == TEXTS
    assert not tally.dropped
    plain = gzip.decompress(data) if suffix == ".gz" else data
    for document in documents[::50]:
        assert plain[int(document.id.rpartition("@")[2]) :].startswith(b"WARC/1.0\r\n")


def test_pages_give_their_main_text_in_any_declared_encoding(tmp_path: Path) -> None:
    utf8, latin = PAGE.format(charset="utf-8").encode(), PAGE.format(charset="iso-8859-1").encode("latin-1")
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(utf8), utf8)
    (tmp_path / "a.warc.gz").write_bytes(
        responses(
            [
                (utf8, html("text/html; charset=UTF-8")),
                (latin, html("text/html; charset=ISO-8859-1")),
                (latin, html()),
                (utf8, html("text/html; charset=no-such")),
                (utf8, html("application/xhtml+xml")),
                (gzip.compress(utf8), html("text/html", ("Content-Encoding", "gzip"))),
                (chunked, html("text/html", ("Transfer-Encoding", "chunked"))),
            ]
        )
    )
    documents, tally = read(tmp_path)
    assert texts(documents) == [MAIN_TEXT] * 7
    assert not tally.dropped


def test_other_contents_are_counted_and_plain_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.warc.gz").write_bytes(
        responses(
            [
                (b"%PDF", html("application/pdf")),
                (b"plain words", html("text/plain")),
                (b"no type", []),
                (b"no gzip", html("text/html", ("Content-Encoding", "gzip"))),
                (gzip.compress(bytes(5_000_000)), html("text/html", ("Content-Encoding", "gzip"))),
                ("Größe".encode("utf-16"), html("text/plain")),
            ]
        )
    )
    documents, tally = read(tmp_path)
    assert texts(documents) == ["plain words"]
    assert counts(tally) == {"not_text": 2, "bad_record": 1, "too_long": 1, "undecodable": 1}


def test_a_page_of_absurd_depth_takes_no_time_and_keeps_its_text(tmp_path: Path) -> None:
    page = b"<html><body>" + b"<div>" * 50_000 + b"some words"
    (tmp_path / "a.warc.gz").write_bytes(responses([(page, html())]))
    start = time.process_time()
    assert texts(read(tmp_path)[0]) == ["some words"]
    assert time.process_time() - start < 5  # it would take minutes


def record(body: bytes, length: object = None, kind: str = "conversion") -> bytes:
    length = len(body) if length is None else length
    return b"WARC/1.0\r\nWARC-Type: %s\r\nContent-Length: %s\r\n\r\n%s\r\n\r\n" % (
        kind.encode(),
        str(length).encode(),
        body,
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(b"lies", length=10), "bad_record"),
        (record(b"lies about much", length=3), "bad_record"),
        (record(b"lies", length=900_000), "truncated"),
        (record(b"lies", length=10**15), "too_long"),
        (record(b"lies", length=-5), "bad_record"),
        (record(b"lies", length="many"), "bad_record"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nno length\r\n\r\n", "bad_record"),
        (b"garbage \0\xff and more\r\n\r\n", "bad_record"),
        (b"garbage" * 300_000, "bad_record"),
        (b"WARC/1.0\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", "bad_record"),
        (record(b"long" * 300_000), "too_long"),
        (record("Größe ".encode("latin-1") * 30), "undecodable"),
        (record(b"", kind="metadata"), None),
    ],
    ids=range(13),
)
def test_a_bad_record_costs_no_other(bad: bytes, reason: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    path.write_bytes(record(b"one") + bad + record(b"two") + record(b"three"))
    documents, tally = read(path)
    assert texts(documents) == ["one", "two", "three"]
    assert places(tally) == ({reason: [f"{path}@{len(record(b'one'))}"]} if reason else {})


@pytest.mark.parametrize("cut", [5, 30, 50, 60])
def test_a_cut_archive_keeps_what_came_before(cut: int, tmp_path: Path) -> None:
    path, last = tmp_path / "a.warc", record(b"the last")
    path.write_bytes(record(b"one") + last[:cut])
    documents, tally = read(path)
    assert texts(documents) == ["one"]
    assert sum(counts(tally).values()) == 1
    assert set(counts(tally)) <= {"truncated", "bad_record"}


def test_a_damaged_member_costs_its_records_only(tmp_path: Path) -> None:
    members = [gzip.compress(record(f"text {i} ".encode() * 500)) for i in range(100)]
    damaged = bytearray(members[50])
    damaged[20:40] = bytes(20)
    path = tmp_path / "a.wet.gz"
    path.write_bytes(b"".join(members[:50]) + damaged + b"".join(members[51:])[:-10])
    documents, tally = read(path)
    kept = {int(document.text.split()[1]) for document in documents}
    assert set(range(99)) - {50} <= kept
    assert counts(tally)["truncated"] == 2


def test_an_empty_archive_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.wet.gz").write_bytes(gzip.compress(b""))
    assert counts(read(tmp_path)[1]) == {"empty_file": 1}
