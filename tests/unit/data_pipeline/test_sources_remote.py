"""URLs through fsspec: a store in memory, and a web server on this machine with and without ranges."""

import gzip
import http.server
import io
import json
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources import UnreadableSplit, content_hash, read_split
from data_pipeline.tally import Tally
from read_sources import plan, read, texts
from trainer.config import UserError

LINES = [json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(1000)]
TEXTS = [f"line {i}" for i in range(1000)]


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    store.pipe("/corpus/deep/a.jsonl", b"".join(LINES))
    store.pipe("/corpus/b.jsonl.gz", gzip.compress(b"".join(LINES)))
    store.pipe("/corpus/c.txt", b"a text")
    store.pipe("/corpus/d.md", b"not a text")
    yield store
    store.rm("/", recursive=True)


def test_folders_globs_and_files_of_a_store(memory: Any) -> None:
    documents, tally = read("memory://corpus", split_bytes=1000)
    assert texts(documents) == [*TEXTS, "a text", *TEXTS]
    assert documents[0].id == "memory:///corpus/b.jsonl.gz@0"
    assert documents[1000].id == "memory:///corpus/c.txt"
    assert documents[1001].id == "memory:///corpus/deep/a.jsonl@0"
    assert not tally.dropped
    assert plan("memory://corpus").notes[0].startswith("memory://corpus: 1 files end neither in .jsonl")
    assert texts(read("memory://corpus/**/*.jsonl")[0]) == TEXTS
    assert texts(read("memory://corpus/deep/a.jsonl", "memory://corpus/deep")[0]) == TEXTS


def test_ids_are_of_names_and_content_in_a_store_too(memory: Any) -> None:
    before = plan("memory://corpus").splits
    memory.cp("/corpus", "/moved", recursive=True)
    assert [split.id for split in plan("memory://moved").splits] == [split.id for split in before]
    memory.pipe("/corpus/c.txt", b"b text")
    after = plan("memory://corpus").splits
    assert [old.id == new.id for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert [split.modified_ns for split in after] == [None] * 3
    assert content_hash(before[2]) == content_hash(after[2])


def test_parquet_in_a_store(memory: Any) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), buffer, row_group_size=100)
    memory.pipe("/tables/a.parquet", buffer.getvalue())
    assert texts(read("memory://tables", split_bytes=1)[0]) == TEXTS


def test_a_file_that_vanishes_from_a_store_fails_its_split(memory: Any) -> None:
    (split,) = plan("memory://corpus/c.txt").splits
    memory.rm("/corpus/c.txt")
    with pytest.raises(UnreadableSplit, match=r"c\.txt"):
        list(read_split(split, 1000, Tally()))


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("gs://bucket/a.jsonl", r"gs://bucket/a.jsonl needs a driver that is not installed; pip install gcsfs"),
        ("gs://bucket/*.jsonl", r"pip install gcsfs"),
        ("zzz://bucket/a.jsonl", r"cannot be used \(Protocol not known: zzz.*check the URL"),
        ("memory://nowhere", r"memory://nowhere does not exist"),
        ("memory://corpus/*.parquet", r"does not exist"),
        ("memory://corpus/d.md", r"ends neither in"),
    ],
)
def test_urls_that_lead_nowhere_are_refused_in_one_line(memory: Any, source: str, rule: str) -> None:
    with pytest.raises(UserError, match=f"^data.sources: .*{rule}") as refusal:
        plan(source)
    assert "\n" not in str(refusal.value)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Python's own server of files, which knows neither ranges nor hashes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass


class WithRanges(Quiet):
    """As a store's web address answers."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        size, wanted = len(data), self.headers.get("Range", "")
        start, end = 0, size
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(size, int(last) + 1) if last else size
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{zlib.crc32(data)}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if with_body:
            self.wfile.write(data[start:end])


@pytest.fixture(params=[Quiet, WithRanges])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    handler = partial(request.param, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", tmp_path
        web.shutdown()
        thread.join()


def test_files_of_a_web_server(server: tuple[str, Path]) -> None:
    url, folder = server
    (folder / "a.jsonl").write_bytes(b"".join(LINES))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(LINES)))
    (folder / "c.txt").write_bytes(b"a text")
    documents, tally = read(f"{url}/a.jsonl?download=true", f"{url}/b.jsonl.gz", f"{url}/c.txt", split_bytes=1000)
    assert texts(documents) == TEXTS + TEXTS + ["a text"]
    assert documents[1000].id == f"{url}/b.jsonl.gz@0"
    assert not tally.dropped
    (split,) = plan(f"{url}/c.txt").splits
    assert split.size_bytes == 6
    (folder / "c.txt").write_bytes(b"b text")
    assert plan(f"{url}/c.txt").splits[0].id != split.id


@pytest.mark.parametrize("server", [Quiet], indirect=True)
def test_a_web_servers_listing_can_be_matched(server: tuple[str, Path]) -> None:
    url, folder = server
    (folder / "corpus").mkdir()
    for part in range(3):
        (folder / f"corpus/{part}.jsonl").write_bytes(b"".join(LINES[part::3]))
    assert len(read(f"{url}/corpus/*.jsonl")[0]) == 1000
    with pytest.raises(UserError, match="does not exist"):
        plan(f"{url}/corpus/gone.jsonl")
