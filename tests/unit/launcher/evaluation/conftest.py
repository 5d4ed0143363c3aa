"""A small tokenizer, and a prepared folder of text that is known."""

from pathlib import Path

import orjson
import pytest

from data_pipeline.pipeline import prepare
from data_pipeline.tokenization import Tokenizer, train_bpe
from inline_workers import InlineWorkers
from launcher.evaluation.tokens import FolderTokenizer
from made_tasks import TEXTS, story
from trainer.config import DataConfig


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FolderTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 380, folder, 64)
    return FolderTokenizer(Tokenizer.load(folder, "reference"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 stories, about a fifth of them held out."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "stories.jsonl").write_bytes(b"".join(orjson.dumps({"text": story(n)}) + b"\n" for n in range(120)))
    data = DataConfig(sources=(str(folder / "stories.jsonl"),), heldout_fraction=0.2)
    prepare(data, vocab_size=350, seq_length=32, out=folder / "data", workers=InlineWorkers())
    return folder / "data"
