"""Text files, each of them one document; small ones are read in batches."""

from collections.abc import Iterator

from data_pipeline.document import Document
from data_pipeline.normalize import decode_utf8, is_text
from data_pipeline.sources.split import Split, format_of
from data_pipeline.sources.storage import open_file
from data_pipeline.sources.streams import OnBytes, Stream, make_stream
from data_pipeline.tally import Tally

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_text(split: Split, max_document_bytes: int, tally: Tally, on_bytes: OnBytes) -> Iterator[Document]:
    """Every file of a batch."""
    for path, place in split.files:
        data = _read_file(path, place, max_document_bytes, tally, on_bytes, split.seekable)
        if data == b"":
            tally.drop("empty_file", place)
        elif data is not None and (text := decode_text(data, place, tally)) is not None:
            yield Document(place, text)


def decode_text(data: bytes, place: str, tally: Tally) -> str | None:
    """UTF-8 text, repaired where it is damaged; None, and counted, if it is no such text."""
    if b"\0" not in data:  # much faster to see in bytes than in text
        try:
            return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
        except UnicodeDecodeError:
            pass
    text, num_broken = decode_utf8(data)
    if not is_text(text, num_broken):
        tally.drop("undecodable", place, text)
        return None
    if num_broken:
        tally.repair("broken_utf8", place, num_broken)
    return text


def _read_file(
    path: str, place: str, max_document_bytes: int, tally: Tally, on_bytes: OnBytes, seekable: bool
) -> bytes | None:
    """What a file holds; None, and counted, if that is too long or damaged."""
    kind = format_of(path)
    assert kind is not None
    with open_file(path, seekable=seekable) as handle:
        stream = make_stream(handle, kind[1], place, tally, on_bytes)
        data = _read_up_to(stream, max_document_bytes + 1)
        if len(data) > max_document_bytes:
            tally.drop("too_long", place, data[:4000].decode("utf-8", errors="replace"))
            return None
        return None if stream.is_damaged else data  # half a text is none


def _read_up_to(stream: Stream, num_bytes: int) -> bytes:
    blocks, missing = [], num_bytes
    while missing > 0 and (block := stream.read()):
        blocks.append(block)
        missing -= len(block)
    return b"".join(blocks)
