"""Whether the fast encoder gives the reference's ids, found out on a sample of every split.

A split's ids come from one encoder: at the first difference the whole of it is encoded again by the reference.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import TokenBatch
from data_pipeline.tokenization.engines import FastEngineError, ReferenceEngine

if TYPE_CHECKING:
    from data_pipeline.tokenization.tokenizer import Tokenizer

T = TypeVar("T")

SAMPLED_FRACTION = 1 / 2048
"""Of a split's documents that both encoders see. The reference is 20 to 100 times slower: 1 to 5 % of the time."""
FIRST_CHARS = 8192
"""Characters at the beginning of every split that are always compared."""
EXCERPT_CHARS = 8192
"""Of a longer document, an excerpt of this length is compared."""
_SHOWN_CHARS = 80


@dataclass(frozen=True)
class Fallback:
    """The fast encoder was left for the reference."""

    engine: str
    found_by: str
    """`self-test`, when the tokenizer was opened, or `sample`, of a split."""
    reason: str
    """One line, with the beginning of the first text that differs."""

    def __str__(self) -> str:
        return f"{self.engine} is not used ({self.found_by}: {self.reason}); the slower reference encoder is"


@dataclass(frozen=True)
class SplitEngine:
    """Which encoder made the ids of a split, and how it was watched."""

    engine: str
    compared_documents: int
    compared_chars: int
    fallback: Fallback | None


class FastEngineWarning(UserWarning):
    """The fast encoder is not used, so tokenizing takes longer; the ids are right."""


class EnginesDiffer(Exception):
    """The fast encoder does not agree with the reference, and what the split has got so far is void."""


class SplitEncoder:
    """Encodes the batches of one split, in order, by one encoder."""

    def __init__(self, tokenizer: "Tokenizer", seed: int, threads: int, fast: bool) -> None:
        self.compared_documents = 0
        self.compared_chars = 0
        self.end_of_text_id = tokenizer.end_of_text_id
        self._tokenizer = tokenizer
        self._threads = threads
        self._fast = tokenizer.fast if fast else None
        self._draw = np.random.default_rng([seed, 0])
        self._draw_excerpt = np.random.default_rng([seed, 1])
        self._first_chars = 0

    def encode_batch(self, texts: Sequence[str]) -> TokenBatch:
        """Token ids of each text, without end-of-text tokens.

        Raises:
            EnginesDiffer: the fast encoder has been found wrong.
            UserError: the tokenizer makes an end-of-text token of ordinary text.
        """
        if self._fast is None:
            return self._tokenizer.encode_batch(texts, self._threads)
        try:
            batch = self._fast.encode_batch(texts, self._threads)
            self._compare(texts, batch)
        except FastEngineError as error:
            raise EnginesDiffer(str(error)) from error
        if self._tokenizer.ends_inside(batch):
            raise EnginesDiffer("it makes an end-of-text token of text")  # the reference says whether that is right
        return batch

    def _compare(self, texts: Sequence[str], batch: TokenBatch) -> None:
        """Compare a sample: the ids of short documents, those of an excerpt of a long one."""
        sample = self._sample(texts)
        short = [index for index in sample if len(texts[index]) <= EXCERPT_CHARS]
        if short:
            self._require_equal(_selected(batch, np.array(short)), [texts[index] for index in short])
        excerpts = [self._excerpt(texts[index]) for index in sample if len(texts[index]) > EXCERPT_CHARS]
        if excerpts:
            assert self._fast is not None
            self._require_equal(self._fast.encode_batch(excerpts), excerpts)

    def _sample(self, texts: Sequence[str]) -> list[int]:
        """Indexes of the documents to compare: the split's first ones, and a drawn fraction of all others."""
        drawn = self._draw.random(len(texts)) < SAMPLED_FRACTION
        for index, text in enumerate(texts):
            if self._first_chars >= FIRST_CHARS:
                break
            drawn[index] = True
            self._first_chars += len(text)
        return np.flatnonzero(drawn).tolist()

    def _excerpt(self, text: str) -> str:
        start = int(self._draw_excerpt.integers(len(text) - EXCERPT_CHARS + 1))
        return text[start : start + EXCERPT_CHARS]

    def _require_equal(self, ids: TokenBatch, texts: list[str]) -> None:
        self.compared_documents += len(texts)
        self.compared_chars += sum(map(len, texts))
        require_equal(ids, self._tokenizer.encode_batch(texts), texts)


def encode_split(
    tokenizer: "Tokenizer", seed: int, write: Callable[[SplitEncoder], T], threads: int = 1
) -> tuple[T, SplitEngine]:
    """Encode a split with the fast encoder, or with the reference where there is none or it has been found wrong.

    The ids are the same either way.

    Args:
        seed: of the sample; a function of the split.
        write: encodes the whole split with the encoder it is given, and stores it. Called a second time when the
            fast encoder has been found wrong: what the first call has stored is void then.
        threads: to encode with.
    """
    encoder = SplitEncoder(tokenizer, seed, threads, fast=True)
    try:
        return write(encoder), _describe(encoder, tokenizer.engine_name, tokenizer.fallback)
    except EnginesDiffer as error:
        fallback = Fallback(tokenizer.engine_name, "sample", str(error))
    warnings.warn(str(fallback), FastEngineWarning, stacklevel=2)
    result = write(SplitEncoder(tokenizer, seed, threads, fast=False))
    return result, _describe(encoder, ReferenceEngine.name, fallback)


def require_equal(ids: TokenBatch, expected: TokenBatch, texts: Sequence[str]) -> None:
    """Compare two encodings of the same texts.

    Raises:
        FastEngineError: they differ.
    """
    if np.array_equal(ids.lengths, expected.lengths) and np.array_equal(ids.ids, expected.ids):
        return
    pairs = zip(ids.documents(), expected.documents(), texts, strict=True)
    text = next(text for got, wanted, text in pairs if not np.array_equal(got, wanted))
    raise FastEngineError(f"it gives other ids for {text[:_SHOWN_CHARS]!r}")


def _selected(batch: TokenBatch, indexes: NDArray[np.int64]) -> TokenBatch:
    ends = np.cumsum(batch.lengths, dtype=np.int64)
    parts = [batch.ids[ends[index] - batch.lengths[index] : ends[index]] for index in indexes]
    return TokenBatch(np.concatenate(parts), batch.lengths[indexes])


def _describe(encoder: SplitEncoder, engine: str, fallback: Fallback | None) -> SplitEngine:
    return SplitEngine(engine, encoder.compared_documents, encoder.compared_chars, fallback)
