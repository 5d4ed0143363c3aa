"""Token losses added up by data set and by position in the sequence, the same in every layout.

Shapes: b micro-batch, s sequence, c context-parallel ranks, d data sets.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import parallel
from trainer.data.batches import MicroBatch
from trainer.model.context_parallel import local_positions
from trainer.pipeline import add_up


class LossSums:
    """Of this rank's share of an evaluation; `add` is what its schedule tells."""

    def __init__(self, num_datasets: int, seq_length: int, device: torch.device) -> None:
        self._by_dataset = torch.zeros(num_datasets, dtype=torch.float64, device=device)
        self._by_position = torch.zeros(seq_length, dtype=torch.float64, device=device)
        self._mine = local_positions(seq_length, parallel.context_rank(), parallel.context_size())

    def add(self, batch: MicroBatch, losses: Tensor) -> None:
        """losses [b, s / c]: those of this rank's positions."""
        assert batch.datasets is not None
        losses = losses.double()
        self._by_position[self._mine] += losses.sum(0)
        # a product, and no scattered additions, whose order differs from one call to the next on a GPU
        rows = F.one_hot(batch.datasets, len(self._by_dataset)).double()  # [b, d]
        self._by_dataset += losses.sum(1) @ rows

    def over_replicas(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums (nats) by data set [d] and by position [s]. Collective; the same on every rank."""
        sums = torch.cat([self._by_dataset, self._by_position])
        add_up(sums)
        by_dataset, by_position = sums.cpu().split([len(self._by_dataset), len(self._by_position)])
        return by_dataset.numpy(), by_position.numpy()
