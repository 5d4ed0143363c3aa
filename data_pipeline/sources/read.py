"""From a split to its documents, whatever its format."""

import os
from collections.abc import Callable, Iterator

import xxhash

from data_pipeline.document import Document
from data_pipeline.sources.hugging_face import hash_shard, read_hugging_face
from data_pipeline.sources.jsonl import read_jsonl
from data_pipeline.sources.python_stdlib import hash_stdlib, read_stdlib_split, stdlib_root
from data_pipeline.sources.split import Format, Split, UnreadableSplit
from data_pipeline.sources.storage import one_line, open_file, read_block
from data_pipeline.sources.streams import BLOCK_BYTES, LineRange, OnBytes
from data_pipeline.sources.text import read_text
from data_pipeline.tally import KEPT_CHARS, Tally

Reader = Callable[[Split, int, Tally, OnBytes], Iterator[Document]]

_MAX_UTF8_BYTES = 4  # of one character


def _reader(format: Format) -> Reader:
    """Imported when it is needed: the libraries behind some take longer to import than a small corpus to prepare."""
    if format == "parquet":
        from data_pipeline.sources.parquet import read_parquet

        return read_parquet
    if format == "warc":
        from data_pipeline.sources.warc import read_warc

        return read_warc
    readers: dict[Format, Reader] = {
        "jsonl": read_jsonl,
        "text": read_text,
        "hugging_face": read_hugging_face,
        "python_stdlib": read_stdlib_split,
    }
    return readers[format]


def _ignore(num_bytes: int) -> None:
    pass


def read_split(split: Split, max_document_bytes: int, tally: Tally, on_bytes: OnBytes = _ignore) -> Iterator[Document]:
    """The documents of a split, in order, in memory that depends on `max_document_bytes` alone.

    What cannot be used is counted in `tally`. `on_bytes` hears of input as it is used, `split.size_bytes` in all.

    Raises:
        UnreadableSplit: a file cannot be opened or read on, was not readable or of another size when it was planned.
    """
    progress = _Progress(split.size_bytes, on_bytes)
    try:
        if split.problem:
            raise OSError(split.problem)
        for document in _reader(split.format)(split, max_document_bytes, tally, progress.add):
            if _is_longer(document.text, max_document_bytes):
                tally.drop("too_long", document.id, document.text[:KEPT_CHARS])
            else:
                yield document
    except OSError as error:
        tally.drop("unreadable", split.place)
        raise UnreadableSplit(f"{error.filename or split.place}: {one_line(error)}") from error
    except UnreadableSplit:
        tally.drop("unreadable", split.place)
        raise
    progress.finish()


def content_hash(split: Split) -> str:
    """xxh3-128, in hex, of all bytes that a split's documents come from: whole lines of a byte range, whole files,
    columns of row groups (of a Hugging Face data set, its texts).

    Raises:
        UnreadableSplit: they cannot be read.
    """
    try:
        if split.format == "hugging_face":
            return hash_shard(split)
        if split.format == "parquet":
            from data_pipeline.sources.parquet import hash_row_groups

            return hash_row_groups(split)
        if split.format == "python_stdlib":
            return hash_stdlib(stdlib_root())
        digest = xxhash.xxh3_128()
        for path, _ in split.files:
            with open_file(path, seekable=split.seekable) as handle:
                if split.format == "jsonl" and not split.compression:
                    lines = LineRange(handle, split.start, split.end, _ignore)
                    _update(digest, lines.read)
                else:
                    _update(digest, lambda: read_block(handle, BLOCK_BYTES))
            digest.update(b"\0")
        return digest.hexdigest()
    except OSError as error:
        raise UnreadableSplit(f"{error.filename or split.place}: {one_line(error)}") from error


def is_unchanged(split: Split) -> bool:
    """Whether no local file of the split was written since it was planned; nobody can say it of others."""
    if split.modified_ns is None:
        return True
    return max(os.stat(path).st_mtime_ns for path, _ in split.files) == split.modified_ns


def _update(digest: xxhash.xxh3_128, read: Callable[[], bytes]) -> None:
    while block := read():
        digest.update(block)


def _is_longer(text: str, num_bytes: int) -> bool:
    if len(text) * _MAX_UTF8_BYTES <= num_bytes:
        return False
    return len(text) > num_bytes or len(text.encode("utf-8", errors="surrogatepass")) > num_bytes


class _Progress:
    """Reports bytes until there are as many as were promised: not what lines reach into the next range."""

    def __init__(self, size_bytes: int, on_bytes: OnBytes) -> None:
        self._left_bytes, self._on_bytes = size_bytes, on_bytes

    def add(self, num_bytes: int) -> None:
        num_bytes = min(num_bytes, self._left_bytes)
        if num_bytes:
            self._left_bytes -= num_bytes
            self._on_bytes(num_bytes)

    def finish(self) -> None:
        self.add(self._left_bytes)
