"""Held-out loss, of each data set and by position in the sequence too, and the baselines that give it a scale."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from trainer import parallel
from trainer.config import RunConfig
from trainer.data.batches import MicroBatch, TrainingData, heldout_micro_batches, heldout_windows
from trainer.data.token_bytes import token_bytes
from trainer.data.windows import HeldoutReader
from trainer.evaluate.loss_sums import LossSums
from trainer.pipeline import WatchLosses

Evaluate = Callable[[Sequence[MicroBatch], WatchLosses], tuple[float, int]]
"""Sum of token losses (nats) and number of tokens over all replicas; the function is told each loss of this one."""

MAX_COUNTED_TOKENS = 1 << 27
"""Training tokens counted for the unigram baseline, split evenly over the data sets; each rank counts for itself."""
_CHUNK_TOKENS = 1 << 18  # counted at once: small enough to spread a sample, large enough to read well
_MIN_PIECES = 64  # of a sample, however small


@dataclass(frozen=True)
class DatasetLoss:
    loss: float
    """Mean nats per token."""
    tokens: int
    bits_per_byte: float | None
    """See `HeldoutResult.bits_per_byte`."""


@dataclass(frozen=True)
class PositionLoss:
    """Of the tokens predicted at positions `first` to `end` - 1; at position p there are p + 1 tokens to go by."""

    first: int
    end: int
    loss: float
    """Mean nats per token."""
    tokens: int


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
    bits_per_byte: float | None
    """All loss over the bytes of text that the predicted tokens spell, which tokenizers can be compared by; None where
    the tokenizer does not tell them, see `trainer.data.token_bytes`."""
    datasets: dict[str, DatasetLoss]
    """Data sets of which a sequence was evaluated, in their order; what each weighs in `loss` are its tokens."""
    positions: tuple[PositionLoss, ...]
    """By position in the sequence, each stretch as long as all before it: whether long context helps."""

    def as_event(self) -> dict[str, Any]:
        """As the record has it, small: positions as loss by `first`."""
        return {
            **asdict(self),
            "datasets": {name: _rounded(asdict(each)) for name, each in self.datasets.items()},
            "positions": _rounded({str(each.first): each.loss for each in self.positions}),
        }


class HeldoutEvaluation:
    """The held-out evaluation of one run; baselines are computed once."""

    def __init__(self, train: TrainingData, heldout: HeldoutReader, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.heldout = heldout
        self.uniform_loss = math.log(config.model.vocab_size)
        windows = heldout_windows(heldout, config)
        labels = heldout.windows(windows)[:, 1:].numpy()
        tokens = [reader.shard.mapped() for reader in train.readers]
        self.unigram_loss = unigram_loss(tokens, train.blend.shares, labels.flatten(), config.model.vocab_size)
        datasets = heldout.datasets(windows)
        self._num_windows = np.bincount(datasets, minlength=len(heldout.names))
        self._num_bytes = self._bytes_of(labels, datasets)

    def _bytes_of(self, labels: np.ndarray, datasets: np.ndarray) -> np.ndarray:
        """Of the text that the labels [windows, s] spell, by data set; 0 where that is not known."""
        lengths = token_bytes(self.heldout.folder)
        if lengths is None or labels.max() >= len(lengths):
            return np.zeros(len(self.heldout.names), dtype=np.int64)
        in_each = np.fromiter((lengths[row].sum() for row in labels), np.int64, len(labels))  # memory stays flat
        return np.bincount(datasets, weights=in_each, minlength=len(self.heldout.names)).astype(np.int64)

    def run(self, evaluate: Evaluate) -> HeldoutResult:
        """Collective; the same result on every rank."""
        seq_length = self.config.model.seq_length
        batches = heldout_micro_batches(self.heldout, self.config, parallel.data_rank(), self.device)
        sums = LossSums(len(self.heldout.names), seq_length, self.device)
        loss_sum, tokens = evaluate(batches, sums.add)
        by_dataset, by_position = sums.over_replicas()
        facts = zip(self.heldout.names, by_dataset, self._num_windows * seq_length, self._num_bytes, strict=True)
        return HeldoutResult(
            loss_sum / tokens,
            tokens,
            self.uniform_loss,
            self.unigram_loss,
            _bits_per_byte(loss_sum, int(self._num_bytes.sum())),
            {
                name: DatasetLoss(float(total / count), int(count), _bits_per_byte(total, int(num_bytes)))
                for name, total, count, num_bytes in facts
                if count
            },
            loss_by_position(by_position, int(self._num_windows.sum())),
        )


def loss_by_position(sums: np.ndarray, num_sequences: int) -> tuple[PositionLoss, ...]:
    """Of sums (nats) at each position [s]: stretches that end at powers of two, the last one at s."""
    ends = [1 << power for power in range((len(sums) - 1).bit_length())] + [len(sums)]
    return tuple(
        PositionLoss(first, end, float(sums[first:end].mean() / num_sequences), (end - first) * num_sequences)
        for first, end in pairwise([0, *ends])
    )


def _bits_per_byte(nats: float, num_bytes: int) -> float | None:
    return float(nats) / (math.log(2) * num_bytes) if num_bytes else None


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


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
