"""Made tasks as files."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import orjson
import yaml

NUM_TEST = 200
NUM_TRAIN = 50
_SEED = 2005  # the month of GPT-3's paper

_T = TypeVar("_T")
Record = dict[str, Any]


@dataclass(frozen=True)
class MadeTask:
    name: str
    tree: Mapping[str, Any]
    """What its YAML file holds, the names of its records aside."""
    test: tuple[Record, ...]
    train: tuple[Record, ...]


def made(name: str, tree: Mapping[str, Any], record: Callable[[Random], Record]) -> MadeTask:
    """A task of records that are drawn one by one, no two alike."""
    draw, records = Random(f"{_SEED} {name}"), dict[bytes, Record]()
    while len(records) < NUM_TEST + NUM_TRAIN:
        each = record(draw)
        records.setdefault(orjson.dumps(each), each)
    return split(name, tree, list(records.values()))


def split(name: str, tree: Mapping[str, Any], records: list[Record], num_train: int = NUM_TRAIN) -> MadeTask:
    return MadeTask(name, tree, tuple(records[num_train:]), tuple(records[:num_train]))


def pick(draw: Random, items: tuple[_T, ...]) -> _T:
    """By `random()`, the one method of which Python promises the same numbers in every version."""
    return items[below(draw, len(items))]


def below(draw: Random, bound: int) -> int:
    """A whole number from 0 to less than the bound."""
    return int(draw.random() * bound)


def shuffled(draw: Random, items: Iterable[_T]) -> list[_T]:
    left = list(items)
    return [left.pop(below(draw, len(left))) for _ in range(len(left))]


def contents(tasks: Iterable[MadeTask]) -> dict[str, bytes]:
    """The files of the tasks by name."""
    files: dict[str, bytes] = {}
    for task in tasks:
        test, train = f"{task.name}.test.jsonl", f"{task.name}.train.jsonl"
        tree = {"about": task.tree["about"], "kind": task.tree["kind"], "test": test, "train": train, **task.tree}
        head = "# Made by `make tasks`: change launcher/evaluation/making instead.\n"
        files[f"{task.name}.yaml"] = head.encode() + _yaml(tree).encode()
        for name, records in ((test, task.test), (train, task.train)):
            files[name] = b"".join(orjson.dumps(record) + b"\n" for record in records)
    return files


class _Dumper(yaml.SafeDumper):
    """Writes line breaks as `\\n`, as people do."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def _yaml(tree: Mapping[str, Any]) -> str:
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    return text
