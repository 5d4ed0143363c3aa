"""Small corpora with known content, made from a fixed seed."""

import random
from pathlib import Path

import orjson
import pytest
from hypothesis import settings

VOCABULARY = (
    "the model reads a token and writes another one while gradients flow back through every layer of it "
    "café naïve Größe 東京 🙂 0 1 42 def return import self"
)

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def made_up_text(seed: int, num_words: int) -> str:
    draw, words = random.Random(seed), VOCABULARY.split()
    return " ".join(draw.choice(words) + draw.choice(["", "", "s", "ing", ".", ",\n"]) for _ in range(num_words))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 distinct documents, about 100 KB: 100 lines of two .jsonl files and 50 .txt files."""
    folder = tmp_path_factory.mktemp("corpus")
    for part in range(2):
        lines = [orjson.dumps({"text": made_up_text(1000 * part + i, 100), "id": i}) for i in range(50)]
        (folder / f"part{part}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "books").mkdir()
    for i in range(50):
        (folder / "books" / f"{i:02}.txt").write_text(made_up_text(5000 + i, 120), encoding="utf-8")
    return folder
