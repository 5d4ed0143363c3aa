"""Reads evaluation texts: strings of .jsonl records, and whole .txt files."""

import glob
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_pipeline.decontamination.overlaps import EvaluationNgrams
from data_pipeline.words import WordTable
from trainer.data_config import DecontaminateConfig
from trainer.section import UserError

_SUFFIXES = (".jsonl", ".txt")
_BATCH_CHARS = 1_000_000


def read_evaluation(config: DecontaminateConfig) -> EvaluationNgrams:
    """The n-grams of `config.against`, each string on its own.

    UserError where anything cannot be read as described: what is left out here would stay in training unseen.
    """
    found, num_strings, num_short = [np.zeros(0, np.uint64)], 0, 0
    for texts in _batches(_strings(config)):
        table = WordTable.of(texts)
        found.append(np.unique(table.ngrams(config.ngram)[0]))
        num_strings += len(texts)
        num_short += int(np.count_nonzero(np.diff(table.first_words) < config.ngram))
    hashes = np.unique(np.concatenate(found))
    if not len(hashes):
        raise UserError(
            f"data.decontaminate.against: none of {num_strings} strings has {config.ngram} words, so nothing could be "
            f"found; lower data.decontaminate.ngram, or name other texts or fields"
        )
    return EvaluationNgrams(hashes, config.ngram, num_strings, num_short)


def _batches(strings: Iterable[str]) -> Iterator[list[str]]:
    batch, num_chars = [], 0
    for text in strings:
        batch.append(unicodedata.normalize("NFC", text))  # as the corpus is
        num_chars += len(text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _strings(config: DecontaminateConfig) -> Iterator[str]:
    files = dict.fromkeys(path for pattern in config.against or () for path in _files(pattern))  # each once
    for path in files:
        yield from _of_file(path, config.fields)


def _files(pattern: str) -> list[Path]:
    """Files that a path, folder (everything below it) or glob names, sorted."""
    path = Path(pattern)
    named = [path] if path.exists() else [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]
    files = [file for one in named for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    readable = [file for file in files if file.suffix in _SUFFIXES and file.is_file()]
    if not readable:
        raise UserError(
            f"data.decontaminate.against: {pattern} names no .jsonl or .txt file; give such a file, a folder or a glob"
        )
    return readable


def _of_file(path: Path, fields: Sequence[str] | None) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield path.read_bytes().decode("utf-8-sig")
            return
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _of_record(orjson.loads(line), fields, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"data.decontaminate.against: {path} is not UTF-8 ({error}); convert it") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"data.decontaminate.against: {path}:{number} is not JSON ({error}); mend the line") from None
    except OSError as error:
        raise UserError(f"data.decontaminate.against: {path} cannot be read ({error}); mend or remove it") from None


def _of_record(record: Any, fields: Sequence[str] | None, place: str) -> Iterator[str]:
    if fields is None:
        yield from _in(record)
        return
    present = [field for field in fields if isinstance(record, dict) and field in record]
    if not present:
        raise UserError(
            f"data.decontaminate.fields: {place} has none of {', '.join(fields)}; name one of its fields, or none at "
            f"all to compare with every string"
        )
    for field in present:
        yield from _in(record[field])


def _in(value: Any) -> Iterator[str]:
    """Every string inside lists and objects, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _in(inner)
