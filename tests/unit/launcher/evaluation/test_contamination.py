"""Records that stand in the training text are found, all of them and no others."""

import re
import shutil
from pathlib import Path

import pytest

from data_pipeline.inspection import documents
from launcher.evaluation import contamination
from launcher.evaluation.contamination import CACHE_FOLDER, find_overlaps, ngram_for
from launcher.evaluation.examples import Example
from launcher.evaluation.finding import LoadedTask
from launcher.evaluation.task import Task
from made_tasks import story
from trainer.config import UserError


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def by_definition(texts: list[str], records: list[str], n: int) -> list[bool | None]:
    grams = {tuple(words(text)[at : at + n]) for text in texts for at in range(len(words(text)) - n + 1)}
    return [
        any(tuple(words(record)[at : at + n]) in grams for at in range(len(words(record)) - n + 1))
        if len(words(record)) >= n
        else None
        for record in records
    ]


def loaded(records: list[str], name: str = "made", ngram: int | None = None) -> LoadedTask:
    task = Task(name=name, kind="cloze", prompt="{x}", answer="{y}", test="t", contamination_ngram=ngram)
    return LoadedTask(task, tuple(Example("", record[:-3], (record[-3:],)) for record in records), ())


def made_records(training: list[str]) -> list[str]:
    """Some with a piece of the training text, cut so that it has n - 1 to n + 1 words in a row of it."""
    records = [story(seed, 3) for seed in range(1000, 1020)]
    for number, text in enumerate(training[:20]):
        first = 0 if number % 3 else len(text.split()) - 11 - number % 4  # at the beginning, or up to the end
        piece = " ".join(text.split()[first : first + 11 + number % 4]).upper().replace(".", " --")
        records.append(f"new words here, {piece} and others after them")
    return [*records, "too short"]


@pytest.fixture(scope="module")
def training(prepared: Path) -> list[str]:
    return [text for _, text in documents(prepared, None, "train", 0, 1000)]


def test_what_is_found_is_what_the_definition_says(prepared: Path, training: list[str], tmp_path: Path) -> None:
    records = made_records(training)
    tasks = [loaded(records, "thirteen", 13), loaded(records, "eight", 8), loaded(records[::-1], "own")]
    folder = shutil.copytree(prepared, tmp_path / "data")
    seen = []
    found = find_overlaps(tasks, folder, lambda *progress: seen.append(progress))
    for name, n, mine in (("thirteen", 13, records), ("eight", 8, records), ("own", 13, records[::-1])):
        assert found[name].ngram == n
        assert list(found[name].is_dirty) == by_definition(training, mine, n), name
        assert {*found[name].is_dirty} == {True, False, None}
    done, total = seen[-1]
    assert done == total > 5000


def test_workers_find_the_same(prepared: Path, training: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(contamination, "_RANGE_DOCUMENTS", 8)
    tasks = [loaded(made_records(training), "thirteen", 13), loaded(made_records(training), "eight", 8)]
    seen, found = [], []
    for num_workers in (1, 2):
        folder = shutil.copytree(prepared, tmp_path / str(num_workers), ignore=shutil.ignore_patterns(CACHE_FOLDER))
        progress: list[tuple[int, int]] = []
        found.append(find_overlaps(tasks, folder, lambda *done, seen=progress: seen.append(done), num_workers))
        seen.append(progress)
    assert found[0] == found[1] and seen[0] == seen[1] and len(seen[0]) > 10


def test_what_was_found_is_kept_until_data_or_records_change(
    prepared: Path, training: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns(CACHE_FOLDER))
    tasks, calls = [loaded(made_records(training))], []

    def search(tasks: list[LoadedTask]) -> object:
        calls.clear()
        return find_overlaps(tasks, folder, lambda *progress: calls.append(progress))

    first = search(tasks)
    assert calls and search(tasks) == first and not calls
    search([loaded(made_records(training)[1:])])
    assert calls
    for path in (folder / CACHE_FOLDER).iterdir():
        path.write_bytes(b"{")
    assert search(tasks) == first and calls
    manifest = (folder / "manifest.json").read_bytes()
    train = re.search(rb'"text/train.bin": \{[^}]*"xxh3_128": "(\w+)"', manifest)
    assert train is not None
    (folder / "manifest.json").write_bytes(manifest.replace(train[1], b"0" * 32))
    assert search(tasks) == first and calls


def test_damaged_data_is_told(prepared: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns(CACHE_FOLDER))
    shard = folder / "text" / "train.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"is damaged \(.*train.bin ends inside document"):
        find_overlaps([loaded(["a b c"])], folder)
    with pytest.raises(UserError, match="holds no prepared data"):
        find_overlaps([loaded(["a b c"])], tmp_path)


@pytest.mark.parametrize(
    ("num_words", "asked", "ngram"),
    [([3] * 40, None, 8), ([100] * 40, None, 13), ([10] * 3 + [50] * 37, None, 10), ([50], 5, 5)],
)
def test_words_that_count_are_those_of_gpt_3(num_words: list[int], asked: int | None, ngram: int) -> None:
    assert ngram_for(loaded([], ngram=asked).task, num_words) == ngram
