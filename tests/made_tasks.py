"""Tasks written into files, and text that is known."""

import random
from pathlib import Path
from typing import Any

import orjson
import yaml

RECORDS = [{"question": f"number {n}?", "answer": str(n)} for n in range(6)]
_NAMES = ("anna", "boris", "clara", "david", "edith", "felix", "greta", "henry", "irene", "jonas")
_VERBS = ("met", "saw", "called", "helped", "followed", "praised", "taught", "warned")


def story(seed: int, num_sentences: int = 12) -> str:
    """Sentences of six words that end in a name, each document another."""
    draw = random.Random(seed)
    return " ".join(
        f"On day {draw.randrange(1000)} {draw.choice(_NAMES)} {draw.choice(_VERBS)} {draw.choice(_NAMES)}."
        for _ in range(num_sentences)
    )


def write_task(
    folder: Path,
    records: list[Any] | None = None,
    train_records: list[Any] | None = None,
    name: str = "made",
    **fields: Any,
) -> Path:
    """The path of a task's YAML file, with its records beside it; a field that is None is left out."""
    for split, written in (("test", RECORDS if records is None else records), ("train", train_records)):
        if written is not None:
            path = folder / f"{name}.{split}.jsonl"
            path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in written))
            fields = {split: path.name} | fields
    tree = {"kind": "generate", "prompt": "Q: {question}\nA:"} | fields
    path = folder / f"{name}.yaml"
    tree = {key: value for key, value in tree.items() if value is not None}
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path
