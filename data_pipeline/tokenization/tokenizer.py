"""What the rest of the pipeline sees of a tokenizer: text to token ids and back, and the tokens that control."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tokenizers
import xxhash

from data_pipeline.shards import TokenBatch, TokenIds, token_dtype
from data_pipeline.tokenization.adversarial import ADVERSARIAL_TEXTS
from data_pipeline.tokenization.agreement import Fallback, require_equal
from data_pipeline.tokenization.engines import FastEngine, FastEngineError, ReferenceEngine
from data_pipeline.tokenization.folder import end_of_text_of, read_tokenizer
from trainer.section import UserError

Engine = Literal["auto", "reference"]


class Tokenizer:
    """Text to token ids and back. Text is always plain text here: no literal in it becomes a special token."""

    def __init__(self, tokenizer_json: bytes, backend: tokenizers.Tokenizer | None = None) -> None:
        """From the content of a tokenizer.json with an end-of-text token; most callers `load` one."""
        backend = backend or tokenizers.Tokenizer.from_buffer(tokenizer_json)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.end_of_text: str = end_of_text_of(backend)
        """The token that ends every document, spelled out."""
        self.end_of_text_id: int = vocab[self.end_of_text]
        self.vocab_size: int = max(vocab.values()) + 1
        """Rows an embedding needs: the largest token id plus one."""
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        self.control_tokens: tuple[str, ...] = tuple(sorted(special | {self.end_of_text}))
        """Every token that text must not spell out, sorted."""
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(tokenizer_json)
        """xxh3-128 of tokenizer.json, in hex."""
        self.fast: FastEngine | None = None
        """Encodes splits, under watch (`encode_split`); None: the reference does."""
        self.fallback: Fallback | None = None
        """Why there is no fast encoder, where one was asked for."""
        self.dtype = token_dtype(self.vocab_size)
        """Of the ids in shards."""
        self._backend = backend
        self._reference = ReferenceEngine(backend, self.vocab_size)

    @classmethod
    def load(cls, folder: Path, engine: Engine = "auto") -> "Tokenizer":
        """Open a tokenizer folder: tokenizer.json, or a SentencePiece tokenizer.model.

        With `auto`, the fast encoder is taken if it passes a self-test on difficult texts.

        Raises:
            UserError: it holds no tokenizer with an end-of-text token.
        """
        content, backend = read_tokenizer(folder)
        tokenizer = cls(content, backend)
        if engine == "auto":
            tokenizer.use_fast(content)
        return tokenizer

    def use_fast(self, tokenizer_json: bytes) -> None:
        """Encode splits by gigatoken from now on, if it opens this and passes the self-test; else note why not."""
        texts = [*ADVERSARIAL_TEXTS, *self.control_tokens]
        try:
            fast = _fast_engine(tokenizer_json, self.vocab_size)
            require_equal(fast.encode_batch(texts), self._reference.encode_batch(texts), texts)
        except FastEngineError as error:
            self.fast, self.fallback = None, Fallback(FastEngine.name, "self-test", str(error))
        else:
            self.fast, self.fallback = fast, None

    @property
    def engine_name(self) -> str:
        """The encoder of splits, with its version."""
        return self.fast.name if self.fast else self._reference.name

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> TokenBatch:
        """Token ids of each text, by the reference, without end-of-text tokens.

        Raises:
            UserError: the tokenizer makes an end-of-text token of ordinary text.
        """
        batch = self._reference.encode_batch(texts, threads)
        if self.ends_inside(batch):
            raise UserError(
                f"data.tokenizer: it encodes some text as {self.end_of_text}, which must only end documents; "
                f"use a byte-level tokenizer, which knows every text"
            )
        return batch

    def ends_inside(self, batch: TokenBatch) -> bool:
        """Whether any end-of-text token stands among the ids of texts."""
        return bool((batch.ids == self.end_of_text_id).any())

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)


@functools.lru_cache(maxsize=1)
def _fast_engine(tokenizer_json: bytes, vocab_size: int) -> FastEngine:
    """Kept: a worker goes from split to split with the words that the encoder has met."""
    return FastEngine(tokenizer_json, vocab_size)
