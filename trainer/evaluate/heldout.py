"""Held-out loss, and the baselines that give it a scale."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainer import parallel
from trainer.config import RunConfig
from trainer.data.batches import MicroBatch, TrainingData, heldout_micro_batches, heldout_windows
from trainer.data.windows import HeldoutReader

Evaluate = Callable[[Sequence[MicroBatch]], tuple[float, int]]
"""Sum of token losses (nats) and number of tokens over all replicas."""

MAX_COUNTED_TOKENS = 1 << 27
"""Training tokens counted for the unigram baseline, split evenly over the data sets; each rank counts for itself."""
_CHUNK_TOKENS = 1 << 18  # counted at once: small enough to spread a sample, large enough to read well
_MIN_PIECES = 64  # of a sample, however small


@dataclass(frozen=True)
class HeldoutResult:
    loss: float
    """Mean nats per held-out token."""
    tokens: int
    """Tokens predicted."""
    uniform_loss: float
    """The loss of giving every token of the vocabulary the same probability."""
    unigram_loss: float
    """The loss of predicting every token by its frequency in the training data, see `unigram_loss`."""


class HeldoutEvaluation:
    """The held-out evaluation of one run; baselines are computed once."""

    def __init__(self, train: TrainingData, heldout: HeldoutReader, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.heldout = heldout
        self.uniform_loss = math.log(config.model.vocab_size)
        labels = heldout.windows(heldout_windows(heldout, config))[:, 1:].flatten().numpy()
        tokens = [reader.shard.mapped() for reader in train.readers]
        self.unigram_loss = unigram_loss(tokens, train.blend.shares, labels, config.model.vocab_size)

    def run(self, evaluate: Evaluate) -> HeldoutResult:
        """Collective; the same result on every rank."""
        batches = heldout_micro_batches(self.heldout, self.config, parallel.data_rank(), self.device)
        loss_sum, tokens = evaluate(batches)
        return HeldoutResult(loss_sum / tokens, tokens, self.uniform_loss, self.unigram_loss)


def unigram_loss(
    train: Sequence[np.ndarray],
    shares: Sequence[float],
    heldout: np.ndarray,
    vocab_size: int,
    max_tokens: int = MAX_COUNTED_TOKENS,
) -> float:
    """Mean nats per held-out token under the frequencies of the training tokens, data sets mixed by their shares.

    Exact up to `max_tokens` / number of data sets tokens of each; of a larger one that many are counted, in pieces at
    even distances. Each count is one higher, so that none is zero.
    """
    counts, num_counted = [], 0
    for tokens in train:
        counts.append(_count(_pieces(tokens, max_tokens // len(train)), vocab_size))
        num_counted += int(counts[-1].sum())
    frequencies = sum(share * each / max(1, each.sum()) for share, each in zip(shares, counts, strict=True))
    log_probabilities = np.log((frequencies * num_counted + 1) / (num_counted + vocab_size))
    return float(-(_count(_pieces(heldout, len(heldout)), vocab_size) * log_probabilities).sum() / len(heldout))


def _pieces(tokens: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """All tokens if they are at most `max_tokens`, else pieces of it from the first to the last, about as many.

    Pieces, and not every n-th token: those would be on every page of the file.
    """
    if len(tokens) <= max_tokens:
        starts = range(0, len(tokens), _CHUNK_TOKENS)
        size = _CHUNK_TOKENS
    else:
        size = min(_CHUNK_TOKENS, max_tokens // _MIN_PIECES)
        starts = np.linspace(0, len(tokens) - size, max_tokens // size).astype(np.int64).tolist()
    yield from (tokens[start : start + size] for start in starts)


def _count(pieces: Iterator[np.ndarray], vocab_size: int) -> np.ndarray:
    """Occurrences of each token id, a piece at a time so that memory stays flat."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for piece in pieces:
        counts += np.bincount(piece, minlength=vocab_size)
    return counts
