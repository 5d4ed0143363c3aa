"""Decides, from the indexes of all parts, which documents stay and which paragraphs go. Bounded memory, no text.

1. Exact: of documents with equal digests all but the first go.
2. Near duplicates, among those left: candidates agree on a band. Sorted by the band's key, the signature entry behind
   it and the document number, each is compared with the `WINDOW` before it that have its key, so that a key shared by
   very many documents costs linear time. A pair is the same if enough signature entries are equal
   (`minhash.least_agreement`). Pairs make clusters, and the first document of each stays. A document without words
   is in no band.
3. Paragraphs, over documents that stay: all but the first occurrence go.

Nothing depends on how documents are cut into parts, nor on the memory allowed.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.clusters import Clusters
from data_pipeline.dedup.decisions import DECISIONS, Verdict, write_decisions
from data_pipeline.dedup.index import BANDS_FILE, EXACT_FILE, PARAGRAPHS_FILE, Indexes
from data_pipeline.dedup.minhash import least_agreement
from data_pipeline.dedup.runs import MergedRuns, Records
from data_pipeline.durable import publish, temporary_path, zeros_on_disk
from data_pipeline.words import Int64s
from trainer.data_config import DedupConfig, FuzzyConfig

WINDOW = 16
"""Documents of the same band key that one is compared with."""

Progress = Callable[[str, int, int], None]
"""Called with the stage (`exact`, `fuzzy`, `paragraphs`), its records done, and its records in all."""

_BYTES_PER_RECORD = 160  # a record while it is merged: read, concatenated, ordered, filtered; measured, rounded up


def decide(
    folders: Sequence[Path],
    config: DedupConfig,
    scratch: Path,
    *,
    max_memory_bytes: int = 1 << 30,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write the decisions over the parts in `folders` to `scratch`/decisions, in place of older ones.

    Besides `max_memory_bytes` pages of files on scratch are mapped: 5 bytes a document.
    """
    folder = scratch / DECISIONS
    temporary = temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    work = temporary / "work"
    work.mkdir(parents=True)
    indexes = Indexes.of(folders)
    assert indexes.num_documents < 1 << 32, "document numbers have 32 bits"
    verdicts = zeros_on_disk(work / "verdicts", np.dtype(np.uint8), indexes.num_documents)
    if config.exact:
        _mark_duplicates(indexes, verdicts, max_memory_bytes, progress)
    if config.fuzzy:
        clusters = Clusters(work / "clusters", indexes.num_documents)
        _cluster(indexes, config.fuzzy, verdicts, clusters, max_memory_bytes, progress)
        _mark_near_duplicates(clusters, verdicts)
    spills = list(_spill_paragraphs(indexes, verdicts, work, max_memory_bytes, progress)) if config.paragraphs else None
    write_decisions(indexes.first_documents, verdicts, spills, temporary)
    shutil.rmtree(work)
    publish(folder)


def _kept_chunks(
    merged: MergedRuns, verdicts: NDArray[np.uint8], max_memory_bytes: int, report: Callable[[int], None]
) -> Iterator[Records]:
    """The records of documents that are kept so far, in order."""
    num_done = 0
    for records in merged.chunks(max(1, max_memory_bytes // _BYTES_PER_RECORD)):
        num_done += len(records)
        report(num_done)
        yield records[verdicts[records["document"]] == Verdict.KEEP]


def _repeats(chunks: Iterator[Records]) -> Iterator[Records]:
    """Of records with equal digests, all but the first."""
    last: Records | None = None
    for records in chunks:
        together = records if last is None else np.concatenate([last, records])
        is_same = together["key"][1:] == together["key"][:-1]
        is_same &= together["rest"][1:] == together["rest"][:-1]
        yield together[1:][is_same]
        last = together[-1:] if len(together) else None


def _mark_duplicates(indexes: Indexes, verdicts: NDArray[np.uint8], max_memory_bytes: int, progress: Progress) -> None:
    merged = indexes.merged(EXACT_FILE)
    chunks = _kept_chunks(merged, verdicts, max_memory_bytes, lambda n: progress("exact", n, merged.num_records))
    for repeats in _repeats(chunks):
        verdicts[repeats["document"]] = Verdict.DUPLICATE


def _cluster(
    indexes: Indexes,
    config: FuzzyConfig,
    verdicts: NDArray[np.uint8],
    clusters: Clusters,
    max_memory_bytes: int,
    progress: Progress,
) -> None:
    max_pairs = max(1, max_memory_bytes // (16 * config.permutations))  # two rows of 4 bytes an entry, twice
    bands = [indexes.merged(BANDS_FILE, band) for band in range(config.bands)]
    total = sum(band.num_records for band in bands)
    for number, merged in enumerate(bands):
        report = partial(_report, progress, number * merged.num_records, total)
        for pairs in _candidates(_kept_chunks(merged, verdicts, max_memory_bytes, report), max_pairs):
            _join_if_same(indexes, config, clusters, *pairs)


def _report(progress: Progress, num_before: int, total: int, num_done: int) -> None:
    progress("fuzzy", num_before + num_done, total)


def _join_if_same(indexes: Indexes, config: FuzzyConfig, clusters: Clusters, left: Int64s, right: Int64s) -> None:
    """Unite the clusters of those pairs whose signatures agree well enough."""
    apart = clusters.roots(left) != clusters.roots(right)  # most pairs of a cluster meet again in many bands
    left, right = left[apart], right[apart]
    rows = indexes.signatures(np.concatenate([left, right]), config.permutations)
    agreement = np.count_nonzero(rows[: len(left)] == rows[len(left) :], axis=1) / config.permutations
    is_same = agreement >= least_agreement(config)
    clusters.join(left[is_same], right[is_same])


def _candidates(chunks: Iterator[Records], max_pairs: int) -> Iterator[tuple[Int64s, Int64s]]:
    """Pairs of documents that share a key and stand at most `WINDOW` apart, at most so many at a time."""
    before: Records | None = None
    for records in chunks:
        together = records if before is None else np.concatenate([before, records])
        documents = together["document"].astype(np.int64)
        for distance in range(1, WINDOW + 1):
            at = np.flatnonzero(together["key"][distance:] == together["key"][:-distance])
            for first in range(0, len(at), max_pairs):
                some = at[first : first + max_pairs]
                yield documents[some], documents[some + distance]
        before = together[-WINDOW:]


def _mark_near_duplicates(clusters: Clusters, verdicts: NDArray[np.uint8]) -> None:
    block = 1 << 20
    for first in range(0, len(verdicts), block):
        behind_another = clusters.to_parent[first : first + block] > 0
        verdicts[first : first + block][behind_another] = Verdict.NEAR_DUPLICATE


def _spill_paragraphs(
    indexes: Indexes, verdicts: NDArray[np.uint8], work: Path, max_memory_bytes: int, progress: Progress
) -> Iterator[Path]:
    """Files of paragraphs to remove: [2, n] document and index, each file sorted."""
    merged = indexes.merged(PARAGRAPHS_FILE)
    chunks = _kept_chunks(merged, verdicts, max_memory_bytes, lambda n: progress("paragraphs", n, merged.num_records))
    for number, repeats in enumerate(repeats for repeats in _repeats(chunks) if len(repeats)):
        order = np.lexsort((repeats["paragraph"], repeats["document"]))
        path = work / f"paragraphs-{number}.npy"
        np.save(path, np.stack([repeats["document"][order], repeats["paragraph"][order]]))
        yield path
