"""What a part of the corpus leaves for deduplication, beside its text: digests, signatures, paragraphs.

Everything that is compared across parts is a sorted run of records (`data_pipeline.dedup.runs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import rensa

from data_pipeline.dedup.minhash import UInt32s, band_keys, signatures
from data_pipeline.dedup.paragraphs import paragraph_digests
from data_pipeline.dedup.runs import BAND, EXACT, PARAGRAPH, MergedRuns, Records, Run, sorted_records
from data_pipeline.durable import write_npy_header
from data_pipeline.words import Int64s, WordTable
from trainer.data_config import DedupConfig, FuzzyConfig

EXACT_FILE = "exact.npy"
"""[d] One EXACT record per document, sorted."""
SIGNATURE = np.dtype("<u4")
SIGNATURES_FILE = "signatures.npy"
"""[d, permutations] In the order of the documents."""
BANDS_FILE = "bands.npy"
"""[bands, documents with words] BAND records, each band sorted."""
PARAGRAPHS_FILE = "paragraphs.npy"
"""[paragraphs long enough] PARAGRAPH records, sorted."""


def index_files(config: DedupConfig) -> tuple[str, ...]:
    """Names of the files that an index of this config consists of; the first one is always there."""
    fuzzy = (SIGNATURES_FILE, BANDS_FILE) if config.fuzzy else ()
    return (EXACT_FILE, *fuzzy, *((PARAGRAPHS_FILE,) if config.paragraphs else ()))


def engine(config: DedupConfig) -> str:
    """Names what else the content of an index depends on; indexes of different engines must not be compared."""
    return f"1, rensa RMinHash {rensa.RMinHash.ALGORITHM_VERSION}" if config.fuzzy else "1"


class IndexWriter:
    """Writes the index of one part; holds about 100 bytes a document and 24 a paragraph in memory."""

    def __init__(self, folder: Path, config: DedupConfig) -> None:
        """Files appear in `folder`, which must exist; they are whole after `finish`, and not synced."""
        self._folder, self._config = folder, config
        self._digests: list[bytes] = []
        self._has_words: list[np.ndarray] = []
        self._paragraphs: list[Records] = []
        self._num_documents = 0
        self._signatures: BinaryIO | None = None
        if config.fuzzy:
            self._signatures = open(folder / SIGNATURES_FILE, "wb")  # noqa: SIM115, closed by finish
            write_npy_header(self._signatures, SIGNATURE, (0, config.fuzzy.permutations))

    def add(self, texts: Sequence[str], digests: Sequence[bytes], table: WordTable | None = None) -> None:
        """A batch of clean documents in order, the xxh3-128 of each text, and its words where they are known."""
        assert len(texts) == len(digests)
        self._digests.append(b"".join(digests))
        if self._config.fuzzy and self._signatures:
            table = table or WordTable.of(texts)
            self._has_words.append(np.diff(table.first_words) > 0)
            self._signatures.write(signatures(table, self._config.fuzzy).tobytes())
        if self._config.paragraphs:
            self._paragraphs.append(_paragraph_records(texts, self._num_documents, self._config.min_paragraph_chars))
        self._num_documents += len(texts)

    def finish(self) -> None:
        exact = np.zeros(self._num_documents, EXACT)
        exact["key"], exact["rest"] = _halves(b"".join(self._digests))
        exact["document"] = np.arange(self._num_documents)
        np.save(self._folder / EXACT_FILE, sorted_records(exact))
        if self._config.fuzzy and self._signatures:
            write_npy_header(self._signatures, SIGNATURE, (self._num_documents, self._config.fuzzy.permutations))
            self._signatures.close()
            documents = np.flatnonzero(np.concatenate([np.zeros(0, bool), *self._has_words]))
            _write_bands(self._folder, self._config.fuzzy, documents)
        if self._config.paragraphs:
            paragraphs = np.concatenate([np.zeros(0, PARAGRAPH), *self._paragraphs])
            np.save(self._folder / PARAGRAPHS_FILE, sorted_records(paragraphs))


@dataclass(frozen=True)
class Indexes:
    """The indexes of all parts, in order."""

    folders: Sequence[Path]
    first_documents: Int64s
    """[parts + 1] Number of each part's first document; the last entry is the number of documents."""

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Indexes":
        sizes = [Run.open(folder / EXACT_FILE).num_records for folder in folders]
        return cls(folders, np.cumsum([0, *sizes], dtype=np.int64))

    @property
    def num_documents(self) -> int:
        return int(self.first_documents[-1])

    def merged(self, name: str, row: int = 0) -> MergedRuns:
        runs = [Run.open(folder / name, row) for folder in self.folders]
        return MergedRuns(runs, self.first_documents[:-1].tolist())

    def signatures(self, documents: Int64s, permutations: int) -> UInt32s:
        """Signatures [n, p] of these documents."""
        order = np.argsort(documents, kind="stable")
        ends = np.searchsorted(documents[order], self.first_documents)
        rows = np.empty((len(documents), permutations), np.uint32)
        for part in np.flatnonzero(np.diff(ends)).tolist():
            chosen = order[ends[part] : ends[part + 1]]
            stored = np.load(self.folders[part] / SIGNATURES_FILE, mmap_mode="r")
            rows[chosen] = stored[documents[chosen] - self.first_documents[part]]
        return rows


def _write_bands(folder: Path, config: FuzzyConfig, documents: np.ndarray) -> None:
    """One band after the other, so that one is in memory."""
    stored: UInt32s = np.load(folder / SIGNATURES_FILE, mmap_mode="r")
    shape = (config.bands, len(documents))
    with open(folder / BANDS_FILE, "wb") as handle:
        write_npy_header(handle, BAND, shape)
        for band in range(config.bands):
            records = np.zeros(len(documents), BAND)
            keys, rests = band_keys(stored, config, band)
            records["key"], records["rest"], records["document"] = keys[documents], rests[documents], documents
            handle.write(sorted_records(records).tobytes())


def _paragraph_records(texts: Sequence[str], first_document: int, min_chars: int) -> Records:
    documents, indices, digests = [], [], []
    for document, text in enumerate(texts, first_document):
        for index, digest in paragraph_digests(text, min_chars):
            documents.append(document)
            indices.append(index)
            digests.append(digest)
    records = np.zeros(len(digests), PARAGRAPH)
    records["key"], records["rest"] = _halves(b"".join(digests))
    records["document"], records["paragraph"] = documents, indices
    return records


def _halves(digests: bytes) -> np.ndarray:
    """[2, n] Upper and lower 64 bits of 16-byte digests."""
    return np.frombuffer(digests, ">u8").reshape(-1, 2).T
