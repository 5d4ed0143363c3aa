"""Sequences out of shards: windows of fixed length that cross document borders, as GPT-3 trained on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trainer.config import UserError
from trainer.data.blend import num_windows
from trainer.data.prepared import PreparedFolder
from trainer.data.shards import Shard


class WindowReader:
    """Windows of `seq_length + 1` tokens over one shard; window i starts at token i * seq_length."""

    def __init__(self, prefix: Path, seq_length: int) -> None:
        """`prefix` names PREFIX.bin and PREFIX.idx.

        Raises:
            UserError: a file is missing or is no shard.
        """
        self.shard = Shard(prefix)
        self.seq_length = seq_length
        self.num_windows = num_windows(self.shard.num_tokens, seq_length)

    def windows(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Token ids [len(indices), seq_length + 1], int64."""
        return read_windows([self], np.zeros(len(indices), np.int64), np.asarray(indices))


class HeldoutReader:
    """The held-out windows of all data sets of a folder, numbered through in the order of the data sets.

    Every data set weighs as much as it has held-out text; neither the blend nor what it leaves out plays a part, so
    that runs with different blends are measured by the same text.
    """

    def __init__(self, folder: PreparedFolder, seq_length: int) -> None:
        """Raises:
        UserError: a shard is missing or damaged, or no data set holds a whole window.
        """
        self.folder = folder
        self.names = tuple(folder.datasets)
        self.readers = [WindowReader(place / "heldout", seq_length) for place in folder.datasets.values()]
        self._ends = np.cumsum([reader.num_windows for reader in self.readers])
        self.num_windows = int(self._ends[-1])
        if self.num_windows < 1:
            longest = max(reader.shard.num_tokens for reader in self.readers)
            raise UserError(
                f"{folder.path} holds no held-out text of one sequence: the longest has {longest} tokens and "
                f"model.seq_length {seq_length} + 1 are needed; raise data.heldout_fraction, add text or shorten the "
                "sequence"
            )

    def windows(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Token ids [len(indices), seq_length + 1], int64."""
        which, starts = self.datasets(indices), np.concatenate([[0], self._ends])
        return read_windows(self.readers, which, np.asarray(indices) - starts[which])

    def datasets(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which data set each window is of, [len(indices)]: places in `names`."""
        return np.searchsorted(self._ends, np.asarray(indices), side="right")


def read_windows(readers: Sequence[WindowReader], which: np.ndarray, indices: np.ndarray) -> torch.Tensor:
    """Window `indices[i]` of `readers[which[i]]` in row i: token ids [len(indices), seq_length + 1], int64.

    Raises:
        UserError: a shard ends before a window that it held when it was opened.
    """
    length = readers[0].seq_length
    rows = np.empty((len(indices), length + 1), dtype=np.int64)
    buffers = [np.empty(length + 1, reader.shard.dtype) for reader in readers]
    for row, number, index in zip(rows, which.tolist(), indices.tolist(), strict=True):
        readers[number].shard.read(index * length, buffers[number])
        row[:] = buffers[number]
    return torch.from_numpy(rows)
