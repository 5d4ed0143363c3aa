"""Training a SentencePiece model that loses nothing: bytes for what it has no piece for, no normalization."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece

from data_pipeline.tokenization.folder import sentencepiece_as_json, write_folder
from data_pipeline.tokenization.sentencepiece_conversion import CONTROL_CHARS
from trainer.section import UserError

SENTENCEPIECE_CONTROLS = ("</s>", "<s>", "<unk>")
MIN_VOCAB_SIZE = 256 + len(SENTENCEPIECE_CONTROLS) + 1  # every byte, the controls, and a piece
_SENTENCE_CHARS = 1000  # at most 4000 bytes; the trainer skips sentences of more than 4192
_SAMPLED_SENTENCES = 200
_SKIPPED_WITH_ITS_SENTENCE = "▅"  # U+2585 stands for the unknown inside the trainer
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_TOO_LARGE = re.compile(r"Vocabulary size too high .* value <= (\d+)")


def train_sentencepiece(
    texts: Iterable[str],
    kind: Literal["sentencepiece_bpe", "sentencepiece_unigram"],
    vocab_size: int,
    folder: Path,
    seq_length: int,
) -> None:
    """Train a model on normalized texts and write its folder: tokenizer.model, and the same as tokenizer.json.

    The same texts give the same bytes. One thread: with more, the pieces of a unigram model are other ones.

    Raises:
        UserError: the vocabulary cannot have exactly `vocab_size` tokens.
    """
    check_sentencepiece_size(vocab_size)
    model = io.BytesIO()
    source = _Sentences(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(source),
            model_writer=model,
            model_type=kind.removeprefix("sentencepiece_"),
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            required_chars="".join(sorted(CONTROL_CHARS)),  # a unigram model's tokenizer.json needs them
            num_threads=1,
            minloglevel=2,  # errors only, which are raised as well
        )
    except RuntimeError as error:
        if source.error is not None:
            raise source.error from None
        raise _refusal(vocab_size, bool(source.sample), error) from error
    content = model.getvalue()
    write_folder(folder, sentencepiece_as_json(content, source.sample), seq_length, content)


def check_sentencepiece_size(vocab_size: int) -> None:
    """Raises:
    UserError: the vocabulary has no room for bytes and control tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"model.vocab_size {vocab_size} is less than the {MIN_VOCAB_SIZE} of a SentencePiece model "
            f"(256 bytes, <unk>, <s>, </s> and a piece); use {MIN_VOCAB_SIZE} or more"
        )


def sentences(text: str) -> Iterator[str]:
    """The text in pieces short enough for the trainer, none of them empty; cut before a space where there is one."""
    start = 0
    while len(text) - start > _SENTENCE_CHARS:
        space = text.rfind(" ", start + 1, start + _SENTENCE_CHARS + 1)
        end = space if space > 0 else start + _SENTENCE_CHARS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


class _Sentences:
    """What the trainer reads. It reports an error met there by its text alone, so the error is kept."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.error: Exception | None = None
        self.sample: list[str] = []
        """The first sentences, to compare encoders on."""
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for part in text.split(_SKIPPED_WITH_ITS_SENTENCE):
                    for sentence in sentences(part):
                        if len(self.sample) < _SAMPLED_SENTENCES:
                            self.sample.append(sentence)
                        yield sentence
        except Exception as error:
            self.error = error
            raise


def _refusal(vocab_size: int, any_text: bool, error: RuntimeError) -> Exception:
    """The error for what the trainer says; only its texts tell what is wrong."""
    if not any_text:
        return UserError(f"model.vocab_size {vocab_size}: there is no text to train the tokenizer on; add text")
    if found := _TOO_SMALL.search(str(error)):
        return UserError(
            f"model.vocab_size {vocab_size} is less than the {found[1]} that the characters of the training text "
            f"and the bytes need; set it to {found[1]} or more"
        )
    if found := _TOO_LARGE.search(str(error)):
        return UserError(
            f"model.vocab_size {vocab_size} is more than the {found[1]} tokens that the training text allows; "
            f"set it to {found[1]} or less, or add text"
        )
    return error
