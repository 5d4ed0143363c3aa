"""Byte-level BPE: training it on text, and turning text into token ids with it.

A tokenizer is a folder that `transformers.AutoTokenizer` opens with no code of ours.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orjson
import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data_pipeline.durable import sync_folder, write_synced
from data_pipeline.normalize import END_OF_TEXT
from data_pipeline.shards import TokenIds, token_dtype
from trainer.config import UserError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MIN_VOCAB_SIZE = 256 + 1  # every byte, and the end-of-text token
_MIN_PAIR_COUNT = 2  # a pair met once teaches nothing
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class Tokenizer:
    """Text to token ids and back. Text is always plain text here: no literal in it becomes a special token."""

    def __init__(self, backend: tokenizers.Tokenizer, fingerprint: str) -> None:
        end_of_text_id = backend.token_to_id(END_OF_TEXT)
        assert end_of_text_id is not None
        backend.no_truncation()  # a folder of the user's may ask for these; a corpus is neither cut nor padded
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.fingerprint = fingerprint
        """xxh3-128 of tokenizer.json, in hex."""
        self.end_of_text_id: int = end_of_text_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """Rows an embedding needs: the largest token id plus one."""
        self._dtype = token_dtype(self.vocab_size)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Open a tokenizer folder.

        Raises:
            UserError: it holds no tokenizer.json with an end-of-text token.
        """
        path = folder / TOKENIZER_FILE
        try:
            content = path.read_bytes()
            backend = tokenizers.Tokenizer.from_buffer(content)
        except OSError as error:
            raise UserError(
                f"data.tokenizer: {path} cannot be read ({error.strerror}); name a folder that holds {TOKENIZER_FILE}"
            ) from error
        except Exception as error:  # what `tokenizers` raises has no class of its own
            raise UserError(
                f"data.tokenizer: {path} is not a tokenizer ({error}); save it again with transformers"
            ) from error
        if backend.token_to_id(END_OF_TEXT) is None:
            raise UserError(
                f"data.tokenizer: {path} has no {END_OF_TEXT} token, which ends every document; "
                f"add it to the tokenizer, or leave data.tokenizer empty to train one"
            )
        return cls(backend, xxhash.xxh3_128_hexdigest(content))

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text, `[num_tokens]` each, of the shards' type.

        Raises:
            UserError: the tokenizer makes an end-of-text token of ordinary text.
        """
        with _threads():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=self._dtype) for encoding in encodings]
        if any((tokens == self.end_of_text_id).any() for tokens in ids):
            raise UserError(
                f"data.tokenizer: it encodes some text as {END_OF_TEXT}, which must only end documents; "
                f"use a byte-level tokenizer, which knows every text"
            )
        return ids

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path, seq_length: int) -> None:
    """Train byte-level BPE with GPT-2's pre-tokenization on normalized texts and write its folder.

    The same texts give the same bytes, whatever the number of threads.

    Raises:
        UserError: the vocabulary cannot have exactly `vocab_size` tokens.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_PAIR_COUNT,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with _threads():
        backend.train_from_iterator(iter(texts), trainer)
    num_tokens = backend.get_vocab_size()
    if num_tokens != vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size} is more than the {num_tokens} tokens that the training text allows; "
            f"set it to {num_tokens} or less, or add text"
        )
    _write_folder(folder, backend.to_str(pretty=True).encode(), seq_length)


def install_tokenizer(source: Path, folder: Path, seq_length: int) -> None:
    """Write the folder for an existing tokenizer: its tokenizer.json as it is, with settings of ours beside it."""
    _write_folder(folder, (source / TOKENIZER_FILE).read_bytes(), seq_length)


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that the model cannot use.

    Raises:
        UserError: it is missing or broken, has no end-of-text token, or is larger than the model's vocabulary.
    """
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer: {folder} has {tokenizer.vocab_size} tokens and model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size}"
        )


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary too small to be byte-level.

    Raises:
        UserError: it is.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size {vocab_size} is less than the {MIN_VOCAB_SIZE} of a byte-level tokenizer "
            f"(256 bytes and {END_OF_TEXT}); use {MIN_VOCAB_SIZE} or more"
        )


def _write_folder(folder: Path, tokenizer_json: bytes, seq_length: int) -> None:
    """tokenizer.json and what transformers needs to know beside it (it neither writes nor needs other files)."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_synced(folder / TOKENIZER_FILE, tokenizer_json)
    write_synced(folder / CONFIG_FILE, orjson.dumps(config, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
    sync_folder(folder)


@contextmanager
def _threads() -> Iterator[None]:
    """Let `tokenizers` use its threads in here, and say so in the only way it listens to: the environment.

    Afterwards they are switched off unless the user has set the variable: a process forked later must not wait for
    threads that it does not have, and left unset, every fork would print a warning.
    """
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = before or "true"
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = before or "false"
