"""Records, one a line, at the speed of orjson: large blocks, split in one call, and little Python for each line."""

import json
from collections.abc import Iterator
from typing import Any

import orjson

from data_pipeline.document import Document
from data_pipeline.normalize import decode_utf8, is_text
from data_pipeline.sources.split import Split
from data_pipeline.sources.streams import OnBytes, Stream, open_stream
from data_pipeline.tally import Tally

RECORD_BYTES = 1 << 20
"""What a line may be longer than the longest document, for its other fields and its escapes."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(split: Split, max_document_bytes: int, tally: Tally, on_bytes: OnBytes) -> Iterator[Document]:
    """The text of every usable record, named by the offset of its line in the (uncompressed) file.

    A line that damage cut is tried like any other, and counted where it cannot be read.
    """
    with open_stream(split, tally, on_bytes) as stream:
        parse = LineParser(split.place, split.text_field, tally)
        while True:
            for offset, lines in line_blocks(stream, max_document_bytes + RECORD_BYTES, split.place, tally):
                yield from parse.documents(offset, lines)
            if not stream.resume():
                break
        if split.start == 0 and stream.offset == 0:
            tally.drop("empty_file", split.place)


def line_blocks(stream: Stream, max_line_bytes: int, place: str, tally: Tally) -> Iterator[tuple[int, list[bytes]]]:
    """Lines without their newlines, many at a time, and the offset of the first.

    Longer lines than allowed are passed over piece by piece, and counted.
    """
    unfinished: list[bytes] = []  # pieces of a line whose end has not come
    unfinished_bytes = 0
    start = stream.offset  # of that line
    while block := stream.read():
        cut = block.rfind(b"\n") + 1
        if cut:
            head = block[:cut]
            if unfinished_bytes:
                first = block.find(b"\n") + 1
                if unfinished_bytes + first > max_line_bytes:
                    tally.drop("too_long", f"{place}@{start}")
                    start += unfinished_bytes + first
                    head = block[first:cut]
                else:
                    head = b"".join([*unfinished, head])
            if head and not head.isspace():  # a gigabyte of newlines is passed quickly
                lines = head.split(b"\n")
                lines.pop()  # what follows the last newline: nothing
                yield start, lines
            start += len(head)
            unfinished, unfinished_bytes = [], 0
        rest = block[cut:]
        unfinished_bytes += len(rest)
        if unfinished_bytes > max_line_bytes:
            unfinished.clear()
        elif rest:
            unfinished.append(rest)
    if unfinished_bytes > max_line_bytes:
        tally.drop("too_long", f"{place}@{start}")
    elif unfinished_bytes:
        yield start, [b"".join(unfinished)]


class LineParser:
    """Turns lines into documents; counts the others."""

    def __init__(self, place: str, text_field: str, tally: Tally) -> None:
        self._place, self._field, self._tally = place, text_field, tally

    def documents(self, offset: int, lines: list[bytes]) -> Iterator[Document]:
        place, field, loads = self._place, self._field, orjson.loads
        for line in lines:
            if line:
                try:
                    text = loads(line)[field]
                except (ValueError, KeyError, TypeError):
                    text = None
                if type(text) is str or (text := self._recover(line, f"{place}@{offset}")) is not None:
                    yield Document(f"{place}@{offset}", text)
            offset += len(line) + 1

    def _recover(self, line: bytes, place: str) -> str | None:
        """The text of a line that the fast way could not use, or None, counted unless the line is blank."""
        stripped = line.removeprefix(_BYTE_ORDER_MARK).strip()
        if not stripped:
            return None
        record = self._parse(stripped, place)
        if record is _UNDECODABLE:
            self._tally.drop("undecodable", place)
        elif not isinstance(record, dict):
            self._tally.drop("bad_json", place)
        elif self._field not in record:
            self._tally.drop("missing_field", place)
        elif not isinstance(record[self._field], str):
            self._tally.drop("field_not_text", place)
        else:
            return str(record[self._field])
        return None

    def _parse(self, line: bytes, place: str) -> Any:
        """The value of a line, or None.

        orjson refuses broken UTF-8 and escaped lone surrogates, which the standard library's parser lets through to be
        repaired.
        """
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass
        text, num_broken = decode_utf8(line)
        if not is_text(text, num_broken):
            return _UNDECODABLE
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if num_broken:
            self._tally.repair("broken_utf8", place, num_broken)
        return record


_UNDECODABLE = object()
