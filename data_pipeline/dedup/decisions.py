"""Decisions on disk, one file a part: what becomes of its documents, and which paragraphs they lose."""

import os
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.minhash import UInt32s
from data_pipeline.durable import sync_folder
from data_pipeline.words import Int64s

DECISIONS = "decisions"
"""Name of the folder of decisions inside the scratch folder."""


class Verdict(IntEnum):
    """What becomes of a document."""

    KEEP = 0
    DUPLICATE = 1
    NEAR_DUPLICATE = 2


def read_verdicts(scratch: Path, part: int) -> NDArray[np.uint8]:
    """Verdicts [d] on the documents of a part."""
    return np.load(_verdicts_file(scratch / DECISIONS, part))


def read_removed_paragraphs(scratch: Path, part: int) -> dict[int, list[int]]:
    """Of kept documents of a part that lose paragraphs: document -> indices, in order (`remove_paragraphs`)."""
    removed: dict[int, list[int]] = {}
    for document, index in np.load(_paragraphs_file(scratch / DECISIONS, part)).tolist():
        removed.setdefault(document, []).append(index)
    return removed


def _verdicts_file(folder: Path, part: int) -> Path:
    return folder / f"verdicts-{part:06}.npy"


def _paragraphs_file(folder: Path, part: int) -> Path:
    return folder / f"paragraphs-{part:06}.npy"


def write_decisions(
    first_documents: Int64s, verdicts: NDArray[np.uint8], spills: Sequence[Path] | None, folder: Path
) -> None:
    """Synced. `spills` are files [2, n] of paragraphs to remove: document and index, sorted; None without any stage."""
    for part, (first, last) in enumerate(pairwise(first_documents.tolist())):
        _save(_verdicts_file(folder, part), verdicts[first:last])
        if spills is not None:
            _save(_paragraphs_file(folder, part), _removed(spills, first, last))
    sync_folder(folder)


def _save(path: Path, array: NDArray[Any]) -> None:
    with open(path, "wb") as handle:
        np.save(handle, array)
        handle.flush()
        os.fsync(handle.fileno())


def _removed(spills: Sequence[Path], first: int, last: int) -> UInt32s:
    """Paragraphs [n, 2] to remove from documents first to last: (document counted from the first, index), sorted."""
    found = [np.zeros((2, 0), np.uint32)]
    for path in spills:
        spill = np.load(path, mmap_mode="r")
        begin, end = np.searchsorted(spill[0], [first, last])
        found.append(spill[:, begin:end])
    documents, indices = np.concatenate(found, axis=1)
    order = np.lexsort((indices, documents))
    return np.stack([documents[order] - np.uint32(first), indices[order]], axis=1)
