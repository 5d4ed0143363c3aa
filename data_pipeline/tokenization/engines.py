"""The encoders: `tokenizers`, whose ids are right by definition, and `gigatoken`, 20 to 100 times as fast.

Both turn a list of texts into one flat array of ids, with no Python object per token where the encoder allows it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import gigatoken
import numpy as np
import orjson
import tokenizers

from data_pipeline.shards import TokenBatch, token_dtype

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_NUM_THREADS = "RAYON_NUM_THREADS"  # 1 in workers of the pipeline
_CACHED_CHARS = 64 << 20
"""Text after which gigatoken starts over with an empty cache of words: it keeps each word that it has met, 2 to 6
bytes of memory for a byte of text without repetitions."""


class FastEngineError(Exception):
    """gigatoken does not know this tokenizer, has failed, or gives other ids; one line says what."""


class ReferenceEngine:
    """`tokenizers`. Text is always plain text here: no literal in it becomes a special token."""

    name = f"tokenizers {tokenizers.__version__}"

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        backend.no_truncation()  # a folder of the user's may ask for these; a corpus is neither cut nor padded
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._dtype = token_dtype(vocab_size)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> TokenBatch:
        with own_threads(False):
            return _in_parts(self._encode, texts, threads)

    def _encode(self, texts: Sequence[str]) -> TokenBatch:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        counts = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        ids = np.empty(int(counts.sum()), dtype=self._dtype)
        end = 0
        for encoding, count in zip(encodings, counts.tolist(), strict=True):
            ids[end : end + count] = encoding.ids
            end += count
        return TokenBatch.of_counts(ids, counts)


class FastEngine:
    """`gigatoken`. Whether its ids are the reference's is for the caller to find out."""

    name = f"gigatoken {version('gigatoken')}"

    def __init__(self, tokenizer_json: bytes | str, vocab_size: int) -> None:
        """Raises:
        FastEngineError: gigatoken cannot open it.
        """
        self._json = _without_special_tokens(tokenizer_json)
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._open()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> TokenBatch:
        """Raises:
        FastEngineError: gigatoken raises, or an id lies outside the vocabulary.
        """
        if self._encoded_chars > _CACHED_CHARS:
            del self._backend  # first: memory holds one
            self._open()
        self._encoded_chars += sum(map(len, texts))
        return _in_parts(self._encode, texts, threads)

    def _encode(self, texts: Sequence[str]) -> TokenBatch:
        # parallel=False: on this thread; its own pool has as many threads as the machine has cores, and dies in a fork
        layout = _guarded(lambda: self._backend.encode_batch(list(texts), parallel=False).layout)
        offsets, ids = np.asarray(layout.offsets.data), np.asarray(layout.content.data)
        ids = ids[offsets[0] : offsets[-1]]
        if len(offsets) != len(texts) + 1:
            raise FastEngineError(f"gigatoken gives {len(offsets) - 1} documents for {len(texts)}")
        if len(ids) and ids.max() >= self._vocab_size:
            raise FastEngineError(f"gigatoken gives the id {ids.max()} of a vocabulary of {self._vocab_size}")
        return TokenBatch.of_counts(ids.astype(self._dtype), np.diff(offsets))

    def _open(self) -> None:
        self._backend: Any = _guarded(lambda: gigatoken.Tokenizer.from_json(self._json))
        self._encoded_chars = 0


@contextmanager
def own_threads(allowed: bool) -> Iterator[None]:
    """Whether `tokenizers` may use threads of its own in here; it listens to nothing but the environment.

    Afterwards they are switched off unless the user has set the variable: a process forked later must not wait for
    threads that it does not have, and left unset, every fork would print a warning.
    """
    before, limit = os.environ.get(_PARALLELISM), os.environ.get(_NUM_THREADS)
    os.environ[_PARALLELISM] = (before or "true") if allowed else "false"
    if allowed:
        os.environ.pop(_NUM_THREADS, None)
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = before or "false"
        if limit is not None:
            os.environ[_NUM_THREADS] = limit


def _in_parts(encode: Callable[[Sequence[str]], TokenBatch], texts: Sequence[str], threads: int) -> TokenBatch:
    """Encode runs of about as many characters on each of `threads` threads; both encoders let go of Python's lock."""
    if threads == 1 or len(texts) < 2:
        return encode(texts)
    ends = np.cumsum([len(text) for text in texts])
    cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, threads) / threads).tolist(), len(texts)]
    with ThreadPoolExecutor(threads) as pool:
        batches = list(pool.map(lambda part: encode(texts[part[0] : part[1]]), pairwise(cuts)))
    return TokenBatch(
        np.concatenate([batch.ids for batch in batches]), np.concatenate([batch.lengths for batch in batches])
    )


def _without_special_tokens(tokenizer_json: bytes | str) -> bytes:
    """The same tokenizer for plain text only: gigatoken has no switch for literals of special tokens."""
    content = orjson.loads(tokenizer_json)
    content["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token["special"]]
    return orjson.dumps(content | {"truncation": None, "padding": None, "post_processor": None})


def _guarded(call: Callable[[], Any]) -> Any:
    """Turn whatever gigatoken raises into an error of ours; a panic of Rust is no `Exception`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise FastEngineError(f"gigatoken raises {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """What it says, without the place in gigatoken's source."""
    return " ".join(str(error).partition("Location:")[0].split())
