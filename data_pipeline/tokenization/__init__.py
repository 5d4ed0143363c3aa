"""Text to token ids: training tokenizers, opening them, and encoding fast with the ids of the reference.

A tokenizer is a folder with a tokenizer.json that `transformers.AutoTokenizer` opens with no code of ours.
"""

from collections.abc import Iterable
from pathlib import Path

from data_pipeline.tokenization.adversarial import ADVERSARIAL_TEXTS
from data_pipeline.tokenization.agreement import Fallback, FastEngineWarning, SplitEncoder, SplitEngine, encode_split
from data_pipeline.tokenization.bpe import check_bpe_size, train_bpe
from data_pipeline.tokenization.folder import (
    CONFIG_FILE,
    END_OF_TEXT,
    SENTENCEPIECE_FILE,
    TOKENIZER_FILE,
    read_tokenizer,
    write_folder,
)
from data_pipeline.tokenization.sentencepiece_training import (
    SENTENCEPIECE_CONTROLS,
    check_sentencepiece_size,
    train_sentencepiece,
)
from data_pipeline.tokenization.tokenizer import Engine, Tokenizer
from trainer.data_config import TokenizerConfig
from trainer.section import UserError

__all__ = [
    "CONFIG_FILE",
    "END_OF_TEXT",
    "SENTENCEPIECE_FILE",
    "TOKENIZER_FILE",
    "Engine",
    "Fallback",
    "FastEngineWarning",
    "SplitEncoder",
    "SplitEngine",
    "Tokenizer",
    "check_tokenizer",
    "check_vocab_size",
    "control_tokens_of",
    "encode_split",
    "install_tokenizer",
    "train_tokenizer",
]


def train_tokenizer(
    texts: Iterable[str], config: TokenizerConfig, vocab_size: int, folder: Path, seq_length: int
) -> None:
    """Train a tokenizer of `config.kind` on normalized texts and write its folder.

    The same texts give the same bytes.

    Raises:
        UserError: the vocabulary cannot have exactly `vocab_size` tokens.
    """
    if config.kind == "bpe":
        train_bpe(texts, vocab_size, folder, seq_length)
    else:
        train_sentencepiece(texts, config.kind, vocab_size, folder, seq_length)


def install_tokenizer(source: Path, folder: Path, seq_length: int) -> None:
    """Write the folder for an existing tokenizer, with settings of ours beside it.

    A tokenizer.json stays as it is; a tokenizer.model is kept, and written as tokenizer.json.

    Raises:
        UserError: see `Tokenizer.load`.
    """
    content, _ = read_tokenizer(source)
    model = source / SENTENCEPIECE_FILE
    write_folder(folder, content, seq_length, model.read_bytes() if model.exists() else None)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that the model cannot use.

    Raises:
        UserError: it is missing or broken, has no end-of-text token or makes one of text, or is larger than the
            model's vocabulary.
    """
    tokenizer = Tokenizer.load(folder, engine="reference")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer: {folder} has {tokenizer.vocab_size} tokens and model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size}"
        )
    tokenizer.encode_batch(ADVERSARIAL_TEXTS)


def control_tokens_of(kind: str) -> tuple[str, ...]:
    """Control tokens that a tokenizer trained here will have."""
    return (END_OF_TEXT,) if kind == "bpe" else SENTENCEPIECE_CONTROLS


def check_vocab_size(vocab_size: int, config: TokenizerConfig) -> None:
    """Refuse a vocabulary too small for the kind of tokenizer to train.

    Raises:
        UserError: it is.
    """
    if config.kind == "bpe":
        check_bpe_size(vocab_size)
    else:
        check_sentencepiece_size(vocab_size)
