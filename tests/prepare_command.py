"""`broadgauge prepare` as a user starts it, on corpora made here, with real worker processes."""

import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import orjson
import pytest
import yaml

from launcher.cli.main import main
from trainer.config_file import from_tree

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from launcher.cli.main import main; main()", "prepare"]
VOCAB_SIZE = 300
SEQ_LENGTH = 16
_SYLLABLES = [*map("".join, itertools.product("bdfgklmnprstvz", "aeiou"))]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "COLUMNS": "400"}


def prepare_command(*arguments: object, timeout_seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
        env=environment(),
    )


def asked(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `prepare_command`, in this process, which has imported all: for commands that only look or refuse."""
    command, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", environment()["COLUMNS"])
        try:
            main(["prepare", *command])
        except SystemExit as end:
            return subprocess.CompletedProcess(command, end.code, out.getvalue(), err.getvalue())
    raise AssertionError("the command did not end")


def prepared(config: Path, out: Path, *more: object, workers: int = 2) -> Path:
    """Run it and see it succeed; returns `out`."""
    done = prepare_command(config, "--out", out, "--workers", workers, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def write_config(path: Path, **data: object) -> Path:
    """A config whose data section is `data`, and the rest small."""
    tree = {
        "model": {"vocab_size": VOCAB_SIZE, "seq_length": SEQ_LENGTH},
        "data": {"heldout_fraction": 0.1, **data},
    }
    from_tree(tree)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def sentence(draw: random.Random, num_words: int = 12) -> str:
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(num_words)]
    return " ".join(words).capitalize() + "."


def text(seed: int, num_sentences: int = 8) -> str:
    draw = random.Random(seed)
    return " ".join(sentence(draw) for _ in range(num_sentences))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps({"text": each}) + b"\n" for each in texts))
    return path


def write_corpus(folder: Path, num_files: int = 6, num_documents: int = 60) -> Path:
    """So many .jsonl files of documents that are all different."""
    for number in range(num_files):
        texts = [text(number * num_documents + i) for i in range(num_documents)]
        write_jsonl(folder / f"{number:02}.jsonl", texts)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(out: Path, dataset: str | None = None) -> Mapping[str, object]:
    found: dict[str, object] = json.loads((out / (dataset or ".") / "manifest.json").read_bytes())
    return found
