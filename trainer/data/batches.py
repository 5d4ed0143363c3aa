"""Samples of a run by position, as micro-batches.

Which tokens the n-th sample of a run is depends on n, the seed, the blend and the data alone: a position is one
integer, resuming costs nothing, and any number of data-parallel ranks sees the same samples in the same global order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from trainer.config import RunConfig
from trainer.data.blend import Blend
from trainer.data.digest import digest
from trainer.data.permutation import permute, permute_groups
from trainer.data.prepared import PreparedFolder
from trainer.data.windows import HeldoutReader, WindowReader, read_windows


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass. `tokens` [b, s + 1]: inputs are all but the last, labels all but the first."""

    tokens: torch.Tensor
    weight: torch.Tensor | None = None
    """[b] 0 for a sequence that only fills up the batch, else 1; None means that all count."""
    datasets: torch.Tensor | None = None
    """[b] Of held-out sequences the number of the data set, in the order of `HeldoutReader.names`."""


@dataclass(frozen=True)
class Draws:
    """Where samples come from; each array is [n]."""

    datasets: np.ndarray
    """Numbers of data sets, in the order of the blend's names."""
    epochs: np.ndarray
    """How often the data set had been gone through before, from 0."""
    windows: np.ndarray
    """Numbers of windows in the data set."""


class TrainingData:
    """The samples of a run, by position: the blend names the data set, a shuffled order of its own the window."""

    def __init__(self, readers: Sequence[WindowReader], blend: Blend, config: RunConfig) -> None:
        """`readers` are of the training shards that `blend` names, in its order."""
        assert len(readers) == len(blend.names)
        self.readers = readers
        self.blend = blend
        self.config = config

    @classmethod
    def open(cls, folder: PreparedFolder, config: RunConfig) -> Self:
        """Raises:
        UserError: a shard is missing or damaged, or the blend does not fit the data sets.
        """
        blend = folder.blend_for(config)
        seq_length = config.model.seq_length
        return cls([WindowReader(folder.datasets[name] / "train", seq_length) for name in blend.names], blend, config)

    def draws(self, positions: np.ndarray) -> Draws:
        """Where the samples at `positions` [n] come from.

        Every epoch of a data set visits each of its windows once, in an order of that epoch and data set.
        """
        datasets, indices = self.blend.locate(positions)
        sizes = np.array([reader.num_windows for reader in self.readers])
        epochs, within = np.divmod(indices, sizes[datasets])
        codes, groups = np.unique(epochs * len(sizes) + datasets, return_inverse=True)
        orders = [divmod(code, len(sizes)) for code in codes.tolist()]
        keys = [self._order_key(epoch, dataset) for epoch, dataset in orders]
        windows = permute_groups(within, groups, [int(sizes[dataset]) for _, dataset in orders], keys)
        return Draws(datasets, epochs, windows)

    def _order_key(self, epoch: int, dataset: int) -> str:
        key = f"{self.config.seed}:{epoch}"
        return key if len(self.readers) == 1 else f"{key}:{self.blend.names[dataset]}"

    def replica_tokens(self, first_sample: int, batch_size: int, data_rank: int) -> torch.Tensor:
        """Token ids [batch_size / replicas, seq_length + 1] of this replica's share of a global batch."""
        micro, replicas = self.config.train.micro_batch_size, self.config.parallel.data
        batch = np.arange(first_sample, first_sample + batch_size)
        mine = batch.reshape(-1, replicas, micro)[:, data_rank].reshape(-1)
        draws = self.draws(mine)
        return read_windows(self.readers, draws.datasets, draws.windows)


@dataclass(frozen=True)
class _Read:
    """One step's token ids [b, s + 1] on the host, and their digest."""

    tokens: torch.Tensor
    digest: int


class ReadAhead:
    """Batches by step, the next of which one thread reads while the caller computes; a context manager."""

    def __init__(
        self, read: Callable[[int], torch.Tensor], num_steps: int, micro_batch_size: int, device: torch.device
    ) -> None:
        """`read(step)`, of 0 to num_steps - 1, is called on the thread and gives token ids [b, s + 1] on the host."""
        self._read, self._num_steps, self._micro_batch_size, self._device = read, num_steps, micro_batch_size, device
        self._thread = ThreadPoolExecutor(1, "read-ahead", self._enter_thread)
        self._ahead: dict[int, Future[_Read]] = {}
        self._given: tuple[int, int] | None = None  # the step last given, and its digest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(cancel_futures=True)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, on the device; from now on the step after it is read.

        Raises:
            Exception: whatever `read` raised for this step.
        """
        wanted = self._ahead.get(step) or self._thread.submit(self._read_for_device, step)
        read = wanted.result()
        following = range(step + 1, min(step + 2, self._num_steps))
        self._ahead = {step: self._thread.submit(self._read_for_device, step) for step in following}
        self._given = step, read.digest
        parts = read.tokens.to(self._device, non_blocking=True).split(self._micro_batch_size)
        return [MicroBatch(part) for part in parts]

    def digest(self, step: int) -> int:
        """The digest (`trainer.data.digest`) of what `micro_batches` gave last, which must have been this step.

        It was computed on the thread: asking for it costs nothing.
        """
        assert self._given is not None and self._given[0] == step, f"step {step} was not the last one given"
        return self._given[1]

    def _enter_thread(self) -> None:
        if self._device.type == "cuda":  # a new thread is on the first GPU, and pinning would start a context there
            torch.cuda.set_device(self._device)

    def _read_for_device(self, step: int) -> _Read:
        tokens = self._read(step)
        seen = digest(tokens)
        return _Read(tokens.pin_memory() if self._device.type == "cuda" else tokens, seen)


def heldout_windows(reader: HeldoutReader, config: RunConfig) -> np.ndarray:
    """The held-out windows to evaluate on: all, or `evaluation.max_sequences` drawn from all over the data.

    The draw depends on the data alone, so every run on it is measured by the same text.
    """
    wanted = config.evaluation.max_sequences or reader.num_windows
    if wanted >= reader.num_windows:
        return np.arange(reader.num_windows)
    return np.sort(permute(np.arange(wanted), reader.num_windows, "heldout"))


def heldout_micro_batches(
    reader: HeldoutReader, config: RunConfig, data_rank: int, device: torch.device
) -> list[MicroBatch]:
    """This replica's share of the held-out windows, every window once over all replicas.

    The last batches are filled up with copies of weight 0, so that every layout computes the same sum.
    """
    windows = heldout_windows(reader, config)
    micro, replicas, stages = config.train.micro_batch_size, config.parallel.data, config.parallel.pipeline
    round_size = micro * replicas * stages  # the interleaved schedule wants whole rounds
    padded = -(-len(windows) // round_size) * round_size
    numbers = np.arange(padded).reshape(-1, replicas, micro)[:, data_rank]
    filled = windows[np.minimum(numbers, len(windows) - 1)]
    return [
        MicroBatch(
            reader.windows(row).to(device),
            torch.from_numpy(number < len(windows)).float().to(device),
            torch.from_numpy(reader.datasets(row)).to(device),
        )
        for row, number in zip(filled, numbers, strict=True)
    ]
