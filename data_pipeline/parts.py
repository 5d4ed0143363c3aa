"""Parts: what the work on one split leaves on disk, whole or not at all.

A part is a folder under its split's id. It is built under a name of its own, synced, described by `part.json`, and
renamed: a folder of that name is a finished part, whoever was killed meanwhile. Going on after an interruption
compares every file's size and hash with `part.json` and does again what differs.
"""

import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import orjson
import xxhash
import zstandard
from numpy.typing import NDArray

from data_pipeline.document import Document
from data_pipeline.durable import sync_folder, write_npy_header, write_synced
from data_pipeline.manifest import FileRecord, Portion, PortionRecord, Record
from data_pipeline.tally import Tally

PART_FILE = "part.json"
_TEXT, _IDS, _DOCUMENTS = "text.zst", "ids.zst", "documents.npy"
_ZSTD_LEVEL = 1
_LENGTH_BYTES = 8  # before each frame

DOCUMENT_DTYPE = np.dtype([("digest_high", "<u8"), ("digest_low", "<u8"), ("text_bytes", "<i8")])
"""One clean document: its xxh3-128 and the bytes of its UTF-8."""


class PartRecord(Record):
    """The content of part.json."""

    made_by: str
    """Fingerprint of everything, the split aside, that the part depends on."""
    content_hash: str = ""
    """xxh3-128 of the split's raw bytes; in the first pass only, as the next."""
    modified_ns: int | None = None
    """Of the split's files, when they were read."""
    documents: int
    """In the part: clean ones, copies included, in the first pass; what is trained on or held out in the second."""
    text_bytes: int
    portions: dict[Portion, PortionRecord]
    """What is in the part as tokens; empty in a part of text."""
    tally: Tally
    notes: tuple[str, ...] = ()
    files: dict[str, FileRecord]

    @property
    def num_tokens(self) -> int:
        return sum(portion.tokens for portion in self.portions.values())


@contextmanager
def new_part(folder: Path) -> Iterator[Path]:
    """A folder to build a part in; `commit_part` gives it its name, otherwise nothing of it stays."""
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_part(temporary: Path, folder: Path, record: PartRecord) -> None:
    """Sync the part's files, write its record, and give it its name.

    Another attempt at the same part, given up for dead and alive after all, may be doing so right now: the first stays.
    """
    for path in temporary.iterdir():
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    content = orjson.dumps(record.model_dump(mode="json"))
    sealed = {"xxh3_128": xxhash.xxh3_128_hexdigest(content), "record": orjson.Fragment(content)}
    write_synced(temporary / PART_FILE, orjson.dumps(sealed))
    sync_folder(temporary)
    while not _renamed(temporary, folder):
        if find_part(folder, record.made_by) == record:
            return
        with suppress(FileNotFoundError), new_part(folder) as away:  # damaged, or of a text that has changed
            os.rename(folder, away / folder.name)
    sync_folder(folder.parent)


def _renamed(temporary: Path, folder: Path) -> bool:
    """Whether the folder could be given its name: it cannot where one with files has it."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def remove_unfinished(folder: Path) -> None:
    """Remove what killed workers have left among the parts in a folder that nobody works in."""
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path)


def records_of(temporary: Path) -> dict[str, FileRecord]:
    """Size and hash of every file in a folder, by name."""
    return {path.name: FileRecord.of(path) for path in sorted(temporary.iterdir())}


def find_part(folder: Path, made_by: str) -> PartRecord | None:
    """The record of a whole part that was made in this way; None if there is none."""
    try:
        sealed = orjson.loads((folder / PART_FILE).read_bytes())
        record = PartRecord.model_validate(sealed["record"])
        is_whole = sealed["xxh3_128"] == xxhash.xxh3_128_hexdigest(orjson.dumps(sealed["record"]))
        is_whole = is_whole and all(file.matches(folder / name) for name, file in record.files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if is_whole and record.made_by == made_by else None


class TextWriter:
    """Streams clean documents into a part, a zstd frame for each batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self._handle = open(folder / _TEXT, "wb")  # noqa: SIM115  (closed by finish)

    def add(self, texts: list[bytes]) -> None:
        frame = self._compressor.compress(b"".join(texts))
        self._handle.write(len(frame).to_bytes(_LENGTH_BYTES, "little"))
        self._handle.write(frame)

    def finish(self) -> None:
        self._handle.close()


class DocumentsWriter:
    """Streams what a part keeps of every document beside its text: digest and size, and where it was found."""

    def __init__(self, folder: Path) -> None:
        self._rows = open(folder / _DOCUMENTS, "wb")  # noqa: SIM115  (closed by finish, as the next)
        self._ids = zstandard.open(folder / _IDS, "wb", cctx=zstandard.ZstdCompressor(level=_ZSTD_LEVEL))
        self.num_documents = 0
        self.text_bytes = 0
        write_npy_header(self._rows, DOCUMENT_DTYPE, (0,))

    def add(self, batch: list[Document], digests: list[bytes], texts: list[bytes]) -> NDArray[np.void]:
        """Returns their rows, [d] of `DOCUMENT_DTYPE`."""
        rows = np.zeros(len(batch), DOCUMENT_DTYPE)
        numbers = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
        rows["digest_high"], rows["digest_low"] = numbers[:, 0], numbers[:, 1]
        rows["text_bytes"] = [len(text) for text in texts]
        self._rows.write(rows.tobytes())
        self._ids.write(orjson.dumps([document.id for document in batch]) + b"\n")
        self.num_documents += len(batch)
        self.text_bytes += int(rows["text_bytes"].sum())
        return rows

    def finish(self) -> None:
        write_npy_header(self._rows, DOCUMENT_DTYPE, (self.num_documents,))
        self._rows.close()
        self._ids.close()


class StoredIds:
    """Where each document of a part was found; to be asked in the order of the documents."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _IDS
        self._batches = self._read()
        self._batch: list[str] = []
        self._first = 0  # number of the batch's first document

    def __getitem__(self, number: int) -> str:
        assert number >= self._first, "ids are read once, from the first to the last"
        while number >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches)
        return self._batch[number - self._first]

    def _read(self) -> Iterator[list[str]]:
        with zstandard.open(self._path, "rb") as handle, io.BufferedReader(handle) as lines:
            yield from map(orjson.loads, lines)


def is_heldout(rows: NDArray[np.void], fraction: float) -> NDArray[np.bool_]:
    """[d] Which documents are held out: a share of all possible digests, so that each document is judged by itself."""
    heldout: NDArray[np.bool_] = rows["digest_high"] < np.uint64(int(fraction * 2**64))
    return heldout


def read_documents(folder: Path) -> NDArray[np.void]:
    """[d] of `DOCUMENT_DTYPE`."""
    rows: NDArray[np.void] = np.load(folder / _DOCUMENTS, mmap_mode="r")
    return rows


def read_texts(folder: Path) -> Iterator[list[str]]:
    """The texts of a part in the batches that were written."""
    sizes, first = read_documents(folder)["text_bytes"], 0
    decompressor = zstandard.ZstdDecompressor()
    with open(folder / _TEXT, "rb") as handle:
        while header := handle.read(_LENGTH_BYTES):
            data = decompressor.decompress(handle.read(int.from_bytes(header, "little")))
            texts, position = [], 0
            while position < len(data):
                texts.append(data[position : position + int(sizes[first])].decode())
                position += int(sizes[first])
                first += 1
            yield texts
