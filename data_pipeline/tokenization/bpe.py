"""Training byte-level BPE with GPT-2's pre-tokenization."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data_pipeline.tokenization.engines import own_threads
from data_pipeline.tokenization.folder import END_OF_TEXT, write_folder
from trainer.section import UserError

MIN_VOCAB_SIZE = 256 + 1  # every byte, and the end-of-text token
_MIN_PAIR_COUNT = 2  # a pair met once teaches nothing


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path, seq_length: int) -> None:
    """Train byte-level BPE with GPT-2's pre-tokenization on normalized texts and write its folder.

    The same texts give the same bytes, whatever the number of threads.

    Raises:
        UserError: the vocabulary cannot have exactly `vocab_size` tokens.
    """
    check_bpe_size(vocab_size)
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
    with own_threads(True):
        backend.train_from_iterator(iter(texts), trainer)
    num_tokens = backend.get_vocab_size()
    if num_tokens != vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size} is more than the {num_tokens} tokens that the training text allows; "
            f"set it to {num_tokens} or less, or add text"
        )
    write_folder(folder, backend.to_str(pretty=True).encode(), seq_length)


def check_bpe_size(vocab_size: int) -> None:
    """Raises:
    UserError: the vocabulary is too small to be byte-level.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size {vocab_size} is less than the {MIN_VOCAB_SIZE} of a byte-level tokenizer "
            f"(256 bytes and {END_OF_TEXT}); use {MIN_VOCAB_SIZE} or more"
        )
