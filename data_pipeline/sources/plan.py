"""From the config to the list of splits: a pure function of what the sources hold."""

import math
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from data_pipeline.sources import hugging_face, python_stdlib
from data_pipeline.sources.find import FoundFile, find_files
from data_pipeline.sources.split import KINDS, Split, format_of, hash_of, printable
from data_pipeline.sources.storage import is_url, one_line
from trainer.data_config import DataConfig, DatasetConfig
from trainer.section import UserError

SPLIT_BYTES = 32 << 20
_MAX_BATCH_FILES = 1000


@dataclass(frozen=True, slots=True)
class Plan:
    splits: tuple[Split, ...]
    """In the order of data sets, sources, names and ranges."""
    notes: tuple[str, ...]
    """What the user should know, one line each."""


def plan_splits(data: DataConfig, split_bytes: int = SPLIT_BYTES) -> Plan:
    """Find every file of the sources and cut it into pieces of about `split_bytes`. Reads little of each file.

    Of a file that is named twice, by whatever data sets, the first counts. A file that cannot be read is a split that
    fails when it is read.

    Raises:
        UserError: a source is missing, empty, or holds no file that can be read.
    """
    planner = _Planner(split_bytes)
    splits: list[Split] = []
    for name, dataset in data.named_datasets.items():
        where = f"data.datasets.{name}.sources" if data.datasets else "data.sources"
        for source in dataset.sources:
            splits += planner.plan(name, dataset, source, where)
    return Plan(tuple(_number_copies(splits)), tuple(planner.notes))


def origin(source: str) -> str:
    """What an entry of the config means on this machine, for the record."""
    if source == python_stdlib.PYTHON_STDLIB:
        return f"standard library of Python {platform.python_version()} (PSF licence)"
    if is_url(source) or source.startswith(hugging_face.PREFIX):
        return source
    return str(Path(source).expanduser().absolute())


def _number_copies(splits: list[Split]) -> Iterator[Split]:
    """Tell apart splits that hold the same, as two copies of a file do."""
    seen: Counter[str] = Counter()
    for split in splits:
        yield replace(split, copy=seen[split.id]) if seen[split.id] else split
        seen[split.id] += 1


class _Planner:
    def __init__(self, split_bytes: int) -> None:
        self._split_bytes = split_bytes
        self._seen: set[str] = set()
        self.notes: list[str] = []

    def plan(self, name: str, dataset: DatasetConfig, source: str, where: str) -> list[Split]:
        if source == python_stdlib.PYTHON_STDLIB or source.startswith(hugging_face.PREFIX):
            if source in self._seen:
                return []
            self._seen.add(source)
            if source == python_stdlib.PYTHON_STDLIB:
                return [self._plan_stdlib(name, dataset)]
            return hugging_face.plan_hugging_face(name, source, dataset.text_field, where)
        files, num_others = find_files(source, where)
        self._check(files, num_others, source, where)
        fresh = []
        for file in files:
            if file.identity not in self._seen:
                self._seen.add(file.identity)
                fresh.append(file)
        return list(self._split_files(name, dataset, source, fresh))

    def _check(self, files: list[FoundFile], num_others: int, source: str, where: str) -> None:
        bad = [file for file in files if file.problem]
        if len(bad) == len(files):
            raise UserError(
                f"{where}: of {source} nothing can be read ({bad[0].place}: {bad[0].problem}); make it readable"
            )
        if not any(file.size_bytes is None or file.size_bytes for file in files):
            raise UserError(
                f"{where}: {source} is empty (0 bytes in {len(files)} files); name a corpus that holds text"
            )
        if num_others:
            self.notes.append(f"{source}: {num_others} files end neither in {KINDS}, and are left out")
        if bad:
            self.notes.append(
                f"{source}: {len(bad)} files cannot be read, each of them a bad split (first {bad[0].place}: "
                f"{bad[0].problem})"
            )

    def _plan_stdlib(self, name: str, dataset: DatasetConfig) -> Split:
        root = python_stdlib.stdlib_root()
        self.notes += python_stdlib.check_stdlib(root)
        return python_stdlib.plan_stdlib(root, name, dataset.text_field)

    def _split_files(self, name: str, dataset: DatasetConfig, source: str, files: list[FoundFile]) -> Iterator[Split]:
        batches = {batch[0].path: batch for batch in self._batch_texts(files)}
        for file in files:
            kind = format_of(file.path)
            assert kind is not None
            if kind[0] == "text" and not file.problem:
                if file.path in batches:
                    yield _text_split(name, dataset, source, batches[file.path])
                continue
            whole = Split(
                dataset=name,
                source=source,
                name=printable(file.name),
                place=file.place,
                path=file.path,
                format=kind[0],
                compression=kind[1],
                start=0,
                end=file.size_bytes or 0,
                size_bytes=file.size_bytes or 0,
                file_bytes=file.size_bytes,
                seekable=file.seekable,
                text_field=dataset.text_field,
                fingerprint=file.fingerprint,
                modified_ns=file.modified_ns,
                problem=file.problem,
            )
            yield from [whole] if file.problem else self._cut(whole)

    def _batch_texts(self, files: list[FoundFile]) -> Iterator[list[FoundFile]]:
        """Text files in order, so many together that a split is worth its while."""
        batch: list[FoundFile] = []
        batch_bytes = 0
        for file in files:
            kind = format_of(file.path)
            if kind is None or kind[0] != "text" or file.problem:
                continue
            size_bytes = file.size_bytes or 0
            if batch and (batch_bytes + size_bytes > self._split_bytes or len(batch) == _MAX_BATCH_FILES):
                yield batch
                batch, batch_bytes = [], 0
            batch.append(file)
            batch_bytes += size_bytes
        if batch:
            yield batch

    def _cut(self, whole: Split) -> list[Split]:
        if whole.format == "parquet":
            return self._cut_parquet(whole)
        if whole.format != "jsonl" or whole.compression or not whole.seekable:
            return [whole]
        num_splits = max(1, math.ceil(whole.end / self._split_bytes))
        bounds = [whole.end * number // num_splits for number in range(num_splits + 1)]  # equal, for equal work
        return [replace(whole, start=start, end=end, size_bytes=end - start) for start, end in pairwise(bounds)]

    def _cut_parquet(self, whole: Split) -> list[Split]:
        try:
            from data_pipeline.sources.parquet import row_group_bytes  # see `read._reader`

            sizes = row_group_bytes(whole.path, whole.text_field)
        except OSError as error:
            problem = one_line(error)
            self.notes.append(f"{whole.source}: {whole.place} is a bad split ({problem})")
            return [replace(whole, problem=problem)]
        splits, start, size_bytes = [], 0, 0
        for group, group_bytes in enumerate(sizes):
            size_bytes += group_bytes
            if size_bytes >= self._split_bytes or group == len(sizes) - 1:
                splits.append(replace(whole, start=start, end=group + 1, size_bytes=size_bytes))
                start, size_bytes = group + 1, 0
        return splits or [replace(whole, end=0, size_bytes=0)]


def _text_split(name: str, dataset: DatasetConfig, source: str, batch: list[FoundFile]) -> Split:
    first = batch[0]
    sizes = [file.size_bytes or 0 for file in batch]
    return Split(
        dataset=name,
        source=source,
        name=printable(first.name),
        place=first.place,
        path=first.path,
        format="text",
        start=0,
        end=len(batch),
        members=tuple(file.name for file in batch),
        size_bytes=sum(sizes),
        file_bytes=None,
        seekable=all(file.seekable for file in batch),
        text_field=dataset.text_field,
        fingerprint=hash_of(*(part for file in batch for part in (file.name, file.fingerprint))),
        modified_ns=None if is_url(first.path) else max(file.modified_ns or 0 for file in batch),
    )
