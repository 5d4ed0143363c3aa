"""Documents that belong together, as a forest on disk: union-find over whole arrays."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import zeros_on_disk
from data_pipeline.words import Int64s


class Clusters:
    """Disjoint sets of document numbers; the lowest number of a set is its root.

    Of every document the distance to a lower one of its set is stored, 0 for roots: a file of zeros has every document
    by itself.
    """

    def __init__(self, path: Path, num_documents: int) -> None:
        self.to_parent: NDArray[np.uint32] = zeros_on_disk(path, np.dtype(np.uint32), num_documents)

    def roots(self, documents: Int64s) -> Int64s:
        roots = documents
        while (steps := self.to_parent[roots]).any():
            roots = roots - steps
        self.to_parent[documents] = documents - roots  # shortens the way for the next time
        return roots

    def join(self, left: Int64s, right: Int64s) -> None:
        """Unite the sets of left[i] and right[i], for every i."""
        while len(left):
            left, right = self.roots(left), self.roots(right)
            apart = left != right
            low, high = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
            # of several sets to unite with, a root takes the farthest; the others come in the next round
            np.maximum.at(self.to_parent, high, (high - low).astype(np.uint32))
            left, right = low, high
