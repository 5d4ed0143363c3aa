"""Columns of text in Parquet files, by row groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data_pipeline.document import Document
from data_pipeline.sources.split import Split, UnreadableSplit
from data_pipeline.sources.storage import one_line, open_file, read_block
from data_pipeline.sources.streams import OnBytes, check_unchanged
from data_pipeline.sources.text import decode_text
from data_pipeline.tally import Tally

_BATCH_BYTES = 4 << 20  # of text decoded at a time, by the file's own account of its size
_MAX_BATCH_ROWS = 8192
_BUFFER_BYTES = 1 << 20


def row_group_bytes(path: str, text_field: str) -> list[int]:
    """Compressed size of every row group's column of text; of all its columns where there is no such one.

    Raises:
        OSError: the file cannot be read, or is no Parquet file.
    """
    with _open(path) as file:
        metadata = file.metadata
        return [
            sum(end - start for start, end in _chunks(metadata.row_group(group), text_field))
            for group in range(metadata.num_row_groups)
        ]


def read_parquet(split: Split, max_document_bytes: int, tally: Tally, on_bytes: OnBytes) -> Iterator[Document]:
    """The text of every row, named by the number of the row in the file, from 0.

    A row group that is damaged is left from there on, and counted once.

    Raises:
        OSError: the file cannot be opened.
        UnreadableSplit: not one row group of the split can be read.
    """
    with _open(split.path, split) as file:
        metadata = file.metadata
        first_row = sum(metadata.row_group(group).num_rows for group in range(split.start))
        problems = []
        for group in range(split.start, split.end):
            rows = _RowGroup(file, group, first_row, split, tally)
            yield from rows.documents()
            first_row += metadata.row_group(group).num_rows
            problems += rows.problems
            on_bytes(sum(end - start for start, end in _chunks(metadata.row_group(group), split.text_field)))
        if len(problems) == split.end - split.start > 0:
            raise UnreadableSplit(f"{split.place}: {problems[0]}")
        if metadata.num_rows == 0:
            tally.drop("empty_file", split.place)


def hash_row_groups(split: Split) -> str:
    """xxh3-128 of the bytes of the split's columns of text."""
    with _open(split.path, split) as file:
        groups = [file.metadata.row_group(group) for group in range(split.start, split.end)]
        ranges = [chunk for group in groups for chunk in _chunks(group, split.text_field)]
        digest = xxhash.xxh3_128(str([group.num_rows for group in groups]).encode())
    with open_file(split.path) as handle:
        for start, end in ranges:
            handle.seek(start)
            while start < end and (block := read_block(handle, min(_BUFFER_BYTES, end - start))):
                digest.update(block)
                start += len(block)
    return digest.hexdigest()


@contextmanager
def _open(path: str, split: Split | None = None) -> Iterator[pq.ParquetFile]:
    with open_file(path) as handle:
        if split is not None:
            check_unchanged(split, handle)
        try:
            file = pq.ParquetFile(handle, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
        except pa.ArrowException as error:
            raise OSError(one_line(error)) from error
        with file:
            yield file


def _chunks(group: Any, text_field: str) -> list[tuple[int, int]]:
    """Where, from and to, the column of text lies in the file; every column if there is none of that name."""
    columns = [group.column(i) for i in range(group.num_columns)]
    named = [column for column in columns if column.path_in_schema == text_field]
    chunks = []
    for column in named or columns:
        start = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset is not None:
            start = min(start, column.dictionary_page_offset)
        chunks.append((start, start + column.total_compressed_size))
    return chunks


class _RowGroup:
    """Reads one row group."""

    def __init__(self, file: pq.ParquetFile, group: int, first_row: int, split: Split, tally: Tally) -> None:
        self._file, self._group, self._row = file, group, first_row
        self._split, self._tally = split, tally
        self.problems: list[str] = []
        """Why the row group could not be read (on)."""

    def documents(self) -> Iterator[Document]:
        metadata, field = self._file.metadata.row_group(self._group), self._split.text_field
        if field not in self._file.schema_arrow.names:
            self._drop_all("missing_field", metadata.num_rows)
            return
        kind = self._file.schema_arrow.field(field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            self._drop_all("field_not_text", metadata.num_rows)
            return
        row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        batch_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes))
        try:
            for batch in self._file.iter_batches(batch_rows, row_groups=[self._group], columns=[field]):
                yield from self._texts(batch.column(0))
        except (pa.ArrowException, OSError) as error:
            self.problems.append(one_line(error))
            self._tally.drop("bad_record", self._place())

    def _texts(self, column: pa.Array) -> Iterator[Document]:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:  # Parquet says that strings are UTF-8, and nobody checks
            texts = pc.cast(column, pa.large_binary()).to_pylist()
        for text in texts:
            if text is None:
                self._tally.drop("field_not_text", self._place())
            elif isinstance(text, bytes):
                text = decode_text(text, self._place(), self._tally)
            if text is not None:
                yield Document(self._place(), text)
            self._row += 1

    def _drop_all(self, reason: str, num_rows: int) -> None:
        for _ in range(num_rows):
            self._tally.drop(reason, self._place())
            self._row += 1

    def _place(self) -> str:
        return f"{self._split.place}:{self._row}"
