"""Texts as a model meets them in training: in tokens, of which each is what the tokenizer makes of the whole text."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data_pipeline.tokenization import Tokenizer
from trainer.config import UserError
from trainer.inference.requests import Tokens


class TextTokenizer(Protocol):
    """Plain text to token ids, with none added, and back."""

    @property
    def end_of_text_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """The same for the same tokenizer, wherever it lies."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def __hash__(self) -> int: ...


class FolderTokenizer:
    """That of a folder with a tokenizer.json: of prepared data, or of an export."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end_of_text_id = tokenizer.end_of_text_id
        self.vocab_size = tokenizer.vocab_size
        self.fingerprint = tokenizer.fingerprint

    @classmethod
    def load(cls, folder: Path) -> "FolderTokenizer":
        """Raises:
        UserError: it holds no tokenizer with an end-of-text token.
        """
        return cls(Tokenizer.load(folder, "reference"))

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode_batch([text]).ids.tolist()
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)


def check_tokenizer(tokenizer: TextTokenizer, trained_with: str | None, vocab_size: int, checkpoint: Path) -> None:
    """Refuse to ask a model in another tokenizer's ids.

    Args:
        trained_with: fingerprint of the tokenizer that the checkpoint knows; None: it knows none.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: they do not fit each other.
    """
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise UserError(
            f"{checkpoint} was trained with another tokenizer (xxh3-128 {trained_with}, this one is "
            f"{tokenizer.fingerprint}); evaluate it with its own"
        )
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and {checkpoint} knows {vocab_size}; evaluate it with "
            "its own tokenizer"
        )


class TokenSplitter:
    """Cuts the tokens of whole texts in two, where a continuation begins."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._beginning = (tokenizer.end_of_text_id,)
        self._encode = functools.lru_cache(maxsize=256)(lambda text: tuple(tokenizer.encode(text)))

    def prompt(self, text: str) -> Tokens:
        """Tokens of a text to go on from; the end-of-text token for none, as before every document in training."""
        return self._encode(text.rstrip(" \t")) or self._beginning

    def split(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """The tokens of both as one text, cut behind the last one in which they are those of the context alone.

        So white space at the end of the context goes with the continuation, and where a token spans the place, it is
        the continuation's. That is empty where the text adds no token.
        """
        if not continuation:
            return self._encode(context) or self._beginning, ()
        stripped = context.rstrip(" \t")
        whole, alone = self._encode(context + continuation), self._encode(stripped)
        num_shared = next(
            (at for at, (one, other) in enumerate(zip(whole, alone, strict=False)) if one != other),
            min(len(whole), len(alone)),
        )
        return whole[:num_shared] or self._beginning, whole[num_shared:]


def stop_ids(tokenizer: TextTokenizer, stops: Sequence[str]) -> Tokens:
    """The end-of-text token, and every one that has a stop text within.

    Tokens that only together spell a stop text end nothing early: answers are cut when they are graded.
    """
    with_stop = [token for token, text in enumerate(_token_texts(tokenizer)) if any(stop in text for stop in stops)]
    return tuple(sorted({tokenizer.end_of_text_id, *with_stop}))


@functools.lru_cache(maxsize=2)
def _token_texts(tokenizer: TextTokenizer) -> tuple[str, ...]:
    return tuple(tokenizer.decode((token,)) for token in range(tokenizer.vocab_size))
