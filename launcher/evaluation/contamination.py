"""Which test records stand in the training text, at least so many words of them in a row (GPT-3, appendix C).

Training text is what the shards of a prepared folder decode to. It streams by: memory holds a batch of documents.
"""

import multiprocessing
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import xxhash

from data_pipeline.decontamination import EvaluationNgrams
from data_pipeline.durable import write_atomically
from data_pipeline.manifest import Manifest
from data_pipeline.publishing import TOKENIZER_FOLDER
from data_pipeline.shards import read_index
from data_pipeline.tokenization import Tokenizer
from data_pipeline.words import UInt64s, WordTable
from launcher.evaluation.finding import LoadedTask
from launcher.evaluation.task import Task
from trainer.config import UserError

OnProgress = Callable[[int, int], None]
"""(tokens compared, tokens in all)."""

CACHE_FOLDER = ".contamination"
_MIN_NGRAM, _MAX_NGRAM, _PERCENTILE = 8, 13, 5  # GPT-3, appendix C
_FORMAT = 1  # of a cached file
_RANGE_DOCUMENTS = 512
_BATCH_CHARS = 1 << 20


@dataclass(frozen=True)
class TaskOverlap:
    """Of one task's test records."""

    ngram: int
    """Words in a row that count."""
    is_dirty: tuple[bool | None, ...]
    """Whether a record shares so many with the training text; None if it has fewer words, so that nobody can tell."""


@dataclass(frozen=True)
class _Range:
    """Documents of one shard."""

    prefix: Path
    first: int
    end: int
    num_tokens: int


def find_overlaps(
    tasks: Sequence[LoadedTask],
    prepared: Path,
    on_progress: OnProgress = lambda done, total: None,
    num_workers: int = 1,
) -> dict[str, TaskOverlap]:
    """Of each task, by name. What was found is kept beside the data, and read where data and records are the same.

    Raises:
        UserError: there is no prepared data, or it is damaged.
    """
    manifest = Manifest.load(prepared)
    records = {loaded.task.name: _Records.of(loaded) for loaded in tasks}
    train_files = {name: file.xxh3_128 for name, file in manifest.files.items() if name.endswith("train.bin")}
    key = [_FORMAT, manifest.tokenizer_fingerprint, train_files, sorted(each.fingerprint for each in records.values())]
    cache = prepared / CACHE_FOLDER / f"{xxhash.xxh3_128_hexdigest(orjson.dumps(key))}.json"
    found = _cached(cache)
    if found is None:
        found = _search(list(records.values()), list(manifest.datasets), prepared, on_progress, num_workers)
        _keep(cache, found)
    return {name: each.overlap(found.get(each.ngram, _NONE)) for name, each in records.items()}


def ngram_for(task: Task, num_words: Sequence[int]) -> int:
    """Words in a row that count for a task, from the lengths of its records."""
    if task.contamination_ngram is not None:
        return task.contamination_ngram
    return int(np.clip(np.percentile(num_words, _PERCENTILE), _MIN_NGRAM, _MAX_NGRAM))


@dataclass(frozen=True)
class _Records:
    """The test records of a task as n-grams."""

    ngram: int
    hashes: tuple[UInt64s, ...]
    """Of each record's n-grams; none of a short one."""

    @classmethod
    def of(cls, loaded: LoadedTask) -> "_Records":
        """A record is its prompt and its right answer, composed (NFC) as the corpus is."""
        table = WordTable.of([unicodedata.normalize("NFC", example.shown) for example in loaded.test])
        ngram = ngram_for(loaded.task, np.diff(table.first_words).tolist())
        hashes, first_words = table.ngrams(ngram)
        bounds = np.searchsorted(first_words, table.first_words[1:-1])
        return cls(ngram, tuple(np.split(hashes, bounds)))

    @property
    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128(self.ngram.to_bytes(8, "little"))
        for hashes in self.hashes:
            digest.update(len(hashes).to_bytes(8, "little") + hashes.tobytes())
        return digest.hexdigest()

    def overlap(self, found: UInt64s) -> TaskOverlap:
        is_dirty = [bool(np.isin(hashes, found).any()) if len(hashes) else None for hashes in self.hashes]
        return TaskOverlap(self.ngram, tuple(is_dirty))


_Found = dict[int, UInt64s]
"""Words in a row -> the n-grams of records that the training text has."""
_NONE = np.zeros(0, np.uint64)


def _search(
    records: Sequence[_Records], datasets: Sequence[str], prepared: Path, on_progress: OnProgress, num_workers: int
) -> _Found:
    wanted = [
        EvaluationNgrams(np.unique(np.concatenate([h for r in records if r.ngram == n for h in r.hashes])), n, 0, 0)
        for n in sorted({each.ngram for each in records})
    ]
    try:
        ranges = [each for name in datasets for each in _ranges(prepared / name / "train")]
        done, total = 0, sum(each.num_tokens for each in ranges)
        found: _Found = {each.ngram: _NONE for each in wanted}
        for searched, mine in _searched(ranges, wanted, prepared / TOKENIZER_FOLDER, num_workers):
            found = {ngram: np.union1d(hashes, mine[ngram]) for ngram, hashes in found.items()}
            done += searched.num_tokens
            on_progress(done, total)
        return found
    except (OSError, ValueError) as error:
        raise UserError(f"{prepared} is damaged ({error}); prepare it again") from error


def _ranges(prefix: Path) -> Iterator[_Range]:
    lengths, _ = read_index(prefix.with_name(f"{prefix.name}.idx"))
    for first in range(0, len(lengths), _RANGE_DOCUMENTS):
        mine = lengths[first : first + _RANGE_DOCUMENTS]
        yield _Range(prefix, first, first + len(mine), int(mine.sum(dtype=np.int64)))


def _searched(
    ranges: Sequence[_Range], wanted: Sequence[EvaluationNgrams], tokenizer: Path, num_workers: int
) -> Iterator[tuple[_Range, _Found]]:
    """Every range with what was found in it, in order."""
    if num_workers <= 1 or len(ranges) <= 1:
        finder = _Finder(wanted, tokenizer)
        yield from ((each, finder.find(each)) for each in ranges)
        return
    waiting: deque[tuple[_Range, Future[_Found]]] = deque()
    with ProcessPoolExecutor(
        min(num_workers, len(ranges)), multiprocessing.get_context("spawn"), _begin, (wanted, tokenizer)
    ) as pool:
        for each in ranges:
            waiting.append((each, pool.submit(_find, each)))
            if len(waiting) > 2 * num_workers:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        yield from ((each, future.result()) for each, future in waiting)


class _Finder:
    """Decodes documents and looks for n-grams in them."""

    def __init__(self, wanted: Sequence[EvaluationNgrams], tokenizer: Path) -> None:
        self._wanted, self._tokenizer = wanted, Tokenizer.load(tokenizer, "reference")

    def find(self, searched: _Range) -> _Found:
        found: dict[int, list[UInt64s]] = {each.ngram: [_NONE] for each in self._wanted}
        for texts in self._batches(searched):
            table = WordTable.of(texts)
            for each in self._wanted:
                found[each.ngram].append(np.unique(each.overlaps(texts, table)["ngram"]))
        return {ngram: np.unique(np.concatenate(hashes)) for ngram, hashes in found.items()}

    def _batches(self, searched: _Range) -> Iterator[list[str]]:
        lengths, offsets = read_index(searched.prefix.with_name(f"{searched.prefix.name}.idx"))
        texts, num_chars = list[str](), 0
        with open(searched.prefix.with_name(f"{searched.prefix.name}.bin"), "rb") as handle:
            for document in range(searched.first, searched.end):
                handle.seek(int(offsets[document]))
                ids = np.fromfile(handle, self._tokenizer.dtype, int(lengths[document]))
                if len(ids) < lengths[document]:
                    raise ValueError(f"{handle.name} ends inside document {document}")
                texts.append(self._tokenizer.decode(ids[:-1]))  # without its end-of-text token
                num_chars += len(texts[-1])
                if num_chars >= _BATCH_CHARS:
                    yield texts
                    texts, num_chars = [], 0
        if texts:
            yield texts


_finder: _Finder | None = None  # a worker's own


def _begin(wanted: Sequence[EvaluationNgrams], tokenizer: Path) -> None:
    global _finder
    _finder = _Finder(wanted, tokenizer)


def _find(searched: _Range) -> _Found:
    assert _finder is not None
    return _finder.find(searched)


def _cached(path: Path) -> _Found | None:
    try:
        tree = orjson.loads(path.read_bytes())
        return {int(ngram): np.array(hashes, np.uint64) for ngram, hashes in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _keep(path: Path, found: _Found) -> None:
    """Where the data's folder can be written to; without, it is searched again the next time."""
    tree = {str(ngram): [int(each) for each in hashes] for ngram, hashes in found.items()}
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, orjson.dumps(tree))
