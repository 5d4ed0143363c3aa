"""Common Crawl's archives (ISO 28500): the text of .wet files, and the main text of the pages in .warc files.

The framing of records is read here, so that a record that lies about its length, or is damaged, costs the others
nothing; the HTTP inside is fastwarc's work and the HTML resiliparse's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fastwarc.warc import WarcRecord

from data_pipeline.document import Document
from data_pipeline.sources.html import page_text
from data_pipeline.sources.split import Split
from data_pipeline.sources.streams import OnBytes, Stream, open_stream
from data_pipeline.sources.text import decode_text
from data_pipeline.tally import Tally

_RECORD_START = re.compile(rb"WARC/[01]\.\d+\r?\n")
_START_BYTES = 16
_MAX_HEADER_BYTES = 64 << 10
_HEADER_END = b"\r\n\r\n"
_TYPE, _CONTENT_LENGTH, _CONTENT_TYPE = (
    re.compile(rb"\r\n%s:([^\r\n]*)" % name, re.IGNORECASE)
    for name in (b"warc-type", b"content-length", b"content-type")
)
_HTML = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True, slots=True)
class Record:
    place: str
    head: bytes
    """The lines of the header as they stand, with the empty one."""
    body: bytes


def read_warc(split: Split, max_document_bytes: int, tally: Tally, on_bytes: OnBytes) -> Iterator[Document]:
    """The text of conversions and of responses, named by the offset of the record in the (uncompressed) file.

    Records of other types (requests, metadata, ...) are no documents and are not counted.
    """
    with open_stream(split, tally, on_bytes) as stream:
        while True:
            for record in read_records(stream, max_document_bytes, split.place, tally):
                text = _text_of(record, max_document_bytes, tally)
                if text is not None:
                    yield Document(record.place, text)
            if not stream.resume():
                break
        if stream.offset == 0:
            tally.drop("empty_file", split.place)


def read_records(stream: Stream, max_body_bytes: int, place: str, tally: Tally) -> Iterator[Record]:
    """Records up to the end of the stream or a gap in it; what is none is passed over, and counted once."""
    window = _Window(stream)
    while window.skip_newlines():
        offset, length = window.offset, None
        if head := window.take_header():
            length = _content_length(head)
        if not head or length is None:
            if not stream.is_damaged:
                tally.drop("bad_record", f"{place}@{offset}")
            window.seek_record()
        elif length > max_body_bytes:
            tally.drop("too_long", f"{place}@{offset}")
            window.seek_record()  # the length may be a lie, and then the next records would be lost
        elif (body := window.take_body(length)) is not None:
            yield Record(f"{place}@{offset}", head, body)
        else:
            if not stream.is_damaged:
                tally.drop("truncated" if window.is_short_of(length) else "bad_record", f"{place}@{offset}")
            window.seek_record()


class _Window:
    """The part of a stream that is being parsed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._data, self._pos = b"", 0
        self._data_offset = stream.offset

    @property
    def offset(self) -> int:
        """Of the next byte in the file."""
        return self._data_offset + self._pos

    def skip_newlines(self) -> bool:
        """Go to the next byte that is not part of a newline; False at the end."""
        while True:
            while self._data[self._pos : self._pos + 1] in (b"\r", b"\n"):
                self._pos += 1
            if self._pos < len(self._data):
                return True
            if not self._fill():
                return False

    def take_header(self) -> bytes:
        """A record's version and named fields, with the empty line; nothing, and no step, if that is not here."""
        while True:
            if not self._is_start():
                return b""
            end = self._data.find(_HEADER_END, self._pos, self._pos + _MAX_HEADER_BYTES)
            if end >= 0:
                head = self._data[self._pos : end + len(_HEADER_END)]
                self._pos += len(head)
                return head
            if len(self._data) - self._pos >= _MAX_HEADER_BYTES or not self._fill():
                return b""

    def take_body(self, num_bytes: int) -> bytes | None:
        """So many bytes, if then the record ends as it must; None, and no step, otherwise."""
        while self.is_short_of(num_bytes + len(_HEADER_END)) and self._fill():
            pass
        end = self._pos + num_bytes
        after = self._data[end : end + len(_HEADER_END)]
        if self.is_short_of(num_bytes) or not _HEADER_END.startswith(after):
            return None
        body = self._data[self._pos : end]
        self._pos = end
        return body

    def is_short_of(self, num_bytes: int) -> bool:
        return len(self._data) - self._pos < num_bytes

    def seek_record(self) -> None:
        """Go to where the next record seems to begin, or to the end."""
        self._pos = min(self._pos + 1, len(self._data))
        while True:
            if found := _RECORD_START.search(self._data, self._pos):
                self._pos = found.start()
                return
            self._pos = max(self._pos, len(self._data) - _START_BYTES)
            if not self._fill():
                self._pos = len(self._data)
                return

    def _is_start(self) -> bool:
        start = self._data[self._pos : self._pos + 5]
        return b"WARC/".startswith(start)

    def _fill(self) -> bool:
        blocks, wanted = [self._data[self._pos :]], len(self._data) - self._pos
        block = self._stream.read()
        self._data_offset += self._pos
        blocks.append(block)
        while block and (wanted := wanted - len(block)) > 0:  # double it: a long body takes few copies
            block = self._stream.read()
            blocks.append(block)
        grown = any(blocks[1:])
        self._data, self._pos = b"".join(blocks), 0
        return grown


def _content_length(head: bytes) -> int | None:
    value = _field(head, _CONTENT_LENGTH)
    return int(value) if value.isdigit() and len(value) < 20 else None


def _field(head: bytes, pattern: re.Pattern[bytes]) -> bytes:
    """A named field's value, in lower case; empty if there is none."""
    found = pattern.search(head)
    return found[1].strip().lower() if found else b""


def _text_of(record: Record, max_document_bytes: int, tally: Tally) -> str | None:
    kind = _field(record.head, _TYPE)
    if kind == b"conversion":
        return decode_text(record.body, record.place, tally)
    if kind != b"response" or not _field(record.head, _CONTENT_TYPE).startswith(b"application/http"):
        return None
    try:
        page = WarcRecord.from_bytes(record.head + record.body + _HEADER_END)
        page.parse_http(auto_decode="all")
        content_type = (page.http_content_type or "").lower()
        body = page.reader.read(max_document_bytes + 1)  # it may be compressed in its turn
    except (OSError, ValueError):
        tally.drop("bad_record", record.place)
        return None
    if len(body) > max_document_bytes:
        tally.drop("too_long", record.place)
    elif content_type in _HTML:
        return page_text(body, page.http_charset)
    elif content_type == "text/plain":
        return decode_text(body, record.place, tally)
    else:
        tally.drop("not_text", record.place)
    return None
