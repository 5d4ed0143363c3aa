"""A whole run small enough for tests: a made-up corpus, a two-layer model, four CPU ranks, two dozen steps."""

import random
import subprocess
import sys
from pathlib import Path

import orjson
import yaml

BROADGAUGE = str(Path(sys.executable).with_name("broadgauge"))
NUM_STEPS = 24

_SENTENCE = """
the model reads a token and then writes another one while every gradient flows back through all of its layers
until the loss is small enough for us to say that it has learned what words tend to follow which other words
"""
_WORDS = _SENTENCE.split()


def write_corpus(path: Path, num_documents: int = 400) -> Path:
    """A .jsonl of sentences with a structure that a model can learn: each word mostly decides the next."""
    draw = random.Random(7)
    with open(path, "wb") as handle:
        for _ in range(num_documents):
            place, words = draw.randrange(len(_WORDS)), []
            for _ in range(draw.randrange(40, 160)):
                words.append(_WORDS[place])
                place = (place + draw.choice((1, 1, 1, 2, 7))) % len(_WORDS)
            handle.write(orjson.dumps({"text": " ".join(words)}) + b"\n")
    return path


def write_config(folder: Path, **changes: dict[str, object]) -> Path:
    """Write corpus.jsonl and run.yaml into `folder`; `changes` update sections."""
    tree: dict[str, object] = {
        "name": "small",
        "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "vocab_size": 320, "seq_length": 32},
        "train": {"total_tokens": NUM_STEPS * 16 * 32, "global_batch_size": 16, "micro_batch_size": 4},
        "optimizer": {"lr": 4.0e-3, "warmup_tokens": 6000},
        "parallel": {"tensor": 2, "pipeline": 2},
        "data": {"sources": [str(write_corpus(folder / "corpus.jsonl"))], "heldout_fraction": 0.05},
        "evaluation": {"max_sequences": 12},
        "checkpoint": {"every_steps": 8},
        "generate": {"prompt": "the model", "max_new_tokens": 8},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}  # type: ignore[dict-item]
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def broadgauge(*arguments: object, timeout_seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BROADGAUGE, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
