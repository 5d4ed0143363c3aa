"""Held-out loss, and the baselines that give it a scale."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainer import parallel
from trainer.config import RunConfig
from trainer.data import MicroBatch, WindowReader, heldout_micro_batches, heldout_windows

Evaluate = Callable[[Sequence[MicroBatch]], tuple[float, int]]
"""Sum of token losses (nats) and number of tokens over all replicas."""


@dataclass(frozen=True)
class HeldoutResult:
    loss: float
    """Mean nats per held-out token."""
    tokens: int
    """Tokens predicted."""
    uniform_loss: float
    """The loss of giving every token of the vocabulary the same probability."""
    unigram_loss: float
    """The loss of predicting every token by its frequency in the training data."""


class HeldoutEvaluation:
    """The held-out evaluation of one run; baselines are computed once."""

    def __init__(self, train: WindowReader, heldout: WindowReader, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.heldout = heldout
        self.uniform_loss = math.log(config.model.vocab_size)
        labels = heldout.windows(heldout_windows(heldout, config))[:, 1:].flatten().numpy()
        self.unigram_loss = unigram_loss(train.tokens, labels, config.model.vocab_size)

    def run(self, evaluate: Evaluate) -> HeldoutResult:
        """Collective; the same result on every rank."""
        batches = heldout_micro_batches(self.heldout, self.config, parallel.data_rank(), self.device)
        loss_sum, tokens = evaluate(batches)
        return HeldoutResult(loss_sum / tokens, tokens, self.uniform_loss, self.unigram_loss)


def unigram_loss(train: np.ndarray, heldout: np.ndarray, vocab_size: int) -> float:
    """Mean nats per held-out token under the training frequencies, each count one higher so that none is zero."""
    counts = _count(train, vocab_size) + 1
    log_probabilities = np.log(counts / counts.sum())
    return float(-(_count(heldout, vocab_size) * log_probabilities).sum() / len(heldout))


def _count(tokens: np.ndarray, vocab_size: int, chunk_tokens: int = 1 << 24) -> np.ndarray:
    """Occurrences of each token id, a chunk at a time so that memory stays flat."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), chunk_tokens):
        counts += np.bincount(tokens[start : start + chunk_tokens], minlength=vocab_size)
    return counts
