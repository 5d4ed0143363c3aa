"""Tokens on disk -> micro-batches, in an order that is computed and never stored.

A prepared data set is a `.bin` of token ids, documents end to end, and an `.idx` that says how to read it
(Megatron's format). Training reads windows of seq_length + 1 tokens that cross document borders, as GPT-3 did. Which
window is the n-th of a run is a function of (seed, n): a position is one integer, resuming costs nothing, and any
number of data-parallel ranks sees the same samples in the same global order.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import orjson
import torch

from trainer.config import RunConfig, UserError

_IDX_MAGIC = b"MMIDIDX\x00\x00"
_IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, number of sequences, of document boundaries
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass. `tokens` [b, s + 1]: inputs are all but the last, labels all but the first."""

    tokens: torch.Tensor
    weight: torch.Tensor | None = None
    """[b] 0 for a sequence that only fills up the batch, else 1; None means that all count."""


class WindowReader:
    """Windows of `seq_length + 1` tokens over one data set; window i starts at token i * seq_length."""

    def __init__(self, prefix: Path, seq_length: int) -> None:
        """`prefix` names PREFIX.bin and PREFIX.idx.

        Raises:
            UserError: a file is missing or is no data set, or it holds less than one window.
        """
        self.tokens = _open_tokens(prefix)
        self.seq_length = seq_length
        self.num_windows = (len(self.tokens) - 1) // seq_length
        if self.num_windows < 1:
            raise UserError(
                f"{prefix}.bin holds {len(self.tokens)} tokens, fewer than one sequence of model.seq_length "
                f"{seq_length} + 1; add text or shorten the sequence"
            )

    def windows(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Token ids [len(indices), seq_length + 1], int64."""
        starts = np.asarray(indices, dtype=np.int64) * self.seq_length
        rows = [self.tokens[start : start + self.seq_length + 1] for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class TrainingData:
    """The samples of a run, by position."""

    def __init__(self, reader: WindowReader, config: RunConfig) -> None:
        self.reader = reader
        self.config = config

    def sample_windows(self, positions: np.ndarray) -> np.ndarray:
        """Window index of each sample position; every epoch visits every window once, in an order of its own."""
        size = self.reader.num_windows
        epochs, indices = np.divmod(positions, size)
        windows = np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = permute(indices[chosen], size, f"{self.config.seed}:{epoch}")
        return windows

    def replica_tokens(self, first_sample: int, batch_size: int, data_rank: int) -> torch.Tensor:
        """Token ids [batch_size / replicas, seq_length + 1] of this replica's share of a global batch."""
        micro, replicas = self.config.train.micro_batch_size, self.config.parallel.data
        batch = np.arange(first_sample, first_sample + batch_size)
        mine = batch.reshape(-1, replicas, micro)[:, data_rank].reshape(-1)
        return self.reader.windows(self.sample_windows(mine))


class ReadAhead:
    """Batches by step, the next of which one thread reads while the caller computes; a context manager."""

    def __init__(
        self, read: Callable[[int], torch.Tensor], num_steps: int, micro_batch_size: int, device: torch.device
    ) -> None:
        """`read(step)`, of 0 to num_steps - 1, is called on the thread and gives token ids [b, s + 1] on the host."""
        self._read, self._num_steps, self._micro_batch_size, self._device = read, num_steps, micro_batch_size, device
        self._thread = ThreadPoolExecutor(1, "read-ahead", self._enter_thread)
        self._ahead: dict[int, Future[torch.Tensor]] = {}

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
        tokens = wanted.result()
        following = range(step + 1, min(step + 2, self._num_steps))
        self._ahead = {step: self._thread.submit(self._read_for_device, step) for step in following}
        parts = tokens.to(self._device, non_blocking=True).split(self._micro_batch_size)
        return [MicroBatch(part) for part in parts]

    def _enter_thread(self) -> None:
        if self._device.type == "cuda":  # a new thread is on the first GPU, and pinning would start a context there
            torch.cuda.set_device(self._device)

    def _read_for_device(self, step: int) -> torch.Tensor:
        tokens = self._read(step)
        return tokens.pin_memory() if self._device.type == "cuda" else tokens


def heldout_windows(reader: WindowReader, config: RunConfig) -> np.ndarray:
    """The held-out windows to evaluate on: all, or `evaluation.max_sequences` drawn from all over the data.

    The draw depends on the data alone, so every run on it is measured by the same text.
    """
    wanted = config.evaluation.max_sequences or reader.num_windows
    if wanted >= reader.num_windows:
        return np.arange(reader.num_windows)
    return np.sort(permute(np.arange(wanted), reader.num_windows, "heldout"))


def heldout_micro_batches(
    reader: WindowReader, config: RunConfig, data_rank: int, device: torch.device
) -> list[MicroBatch]:
    """This replica's share of the held-out windows, every window once over all replicas.

    The last batches are filled up with copies of weight 0, so that every layout computes the same sum.
    """
    windows = heldout_windows(reader, config)
    micro, replicas, stages = config.train.micro_batch_size, config.parallel.data, config.parallel.pipeline
    round_size = micro * replicas * stages  # the interleaved schedule wants whole rounds
    padded = -(-len(windows) // round_size) * round_size
    numbers = np.arange(padded).reshape(-1, replicas, micro)[:, data_rank]
    return [
        MicroBatch(
            reader.windows(windows[np.minimum(row, len(windows) - 1)]).to(device),
            torch.from_numpy(row < len(windows)).float().to(device),
        )
        for row in numbers
    ]


def fingerprints(folder: Path) -> dict[str, str]:
    """What a prepared folder's manifest says of its tokenizer and of its training tokens (xxh3-128); {} without one.

    A checkpoint keeps them, because weights mean nothing under another tokenizer, nor a position in other data.
    """
    try:
        manifest = orjson.loads((folder / "manifest.json").read_bytes())
        return {"tokenizer": manifest["tokenizer_fingerprint"], "train": manifest["files"]["train.bin"]["xxh3_128"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'manifest.json'} is not a manifest of prepared data; prepare it again") from error


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at `indices` alone.

    A Feistel network over the smallest even number of bits that holds `size`; results outside the range are sent
    through again until they fall inside (cycle walking), which keeps it one to one.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _FEISTEL_ROUNDS).digest(), dtype=np.uint64)
    result = _feistel(indices.astype(np.uint64), keys, half_bits, mask)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], keys, half_bits, mask)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int, mask: np.uint64) -> np.ndarray:
    left, right = values >> np.uint64(half_bits), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _open_tokens(prefix: Path) -> np.ndarray:
    """Memory-map PREFIX.bin as the type that PREFIX.idx states."""
    idx_path, bin_path = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    try:
        with open(idx_path, "rb") as handle:
            magic, _, code, num_sequences, _ = _IDX_HEADER.unpack(handle.read(_IDX_HEADER.size))
            if magic != _IDX_MAGIC:
                raise UserError(f"{idx_path} is not a Megatron index; prepare the data again")
            if code not in _DTYPES:
                raise UserError(f"{idx_path} states the unknown token type {code}; prepare the data again")
            dtype = np.dtype(_DTYPES[code])
            stated = _bytes_stated(handle, num_sequences, dtype.itemsize)
        size = bin_path.stat().st_size
    except OSError as error:
        raise UserError(
            f"cannot read the data set {prefix}: {error.strerror}: {error.filename}; prepare it first"
        ) from error
    except struct.error as error:
        raise UserError(f"{idx_path} is not a Megatron index, or cut off; prepare the data again") from error
    if size == 0 or size != stated:
        raise UserError(f"{bin_path} has {size} bytes and {idx_path} states {stated}; prepare the data again")
    return np.memmap(bin_path, dtype=dtype, mode="r")


def _bytes_stated(idx: BinaryIO, num_sequences: int, token_bytes: int) -> int:
    """Where the last sequence ends. The index holds all lengths (int32 tokens), then all offsets (int64 bytes)."""
    if num_sequences == 0:
        return 0
    idx.seek(_IDX_HEADER.size + 4 * (num_sequences - 1))
    (length,) = struct.unpack("<i", idx.read(4))
    idx.seek(_IDX_HEADER.size + 4 * num_sequences + 8 * (num_sequences - 1))
    (offset,) = struct.unpack("<q", idx.read(8))
    return offset + length * token_bytes
