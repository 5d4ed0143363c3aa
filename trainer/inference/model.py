"""What a model must do to be asked: a narrow door, behind which any layout may lie.

`trainer.inference.cached` is one, with a cache of keys and values. Another may run fixed windows through whatever holds
the weights: it needs no more than these methods, and says `num_replicas` 1 if its data-parallel ranks move together.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trainer.inference.requests import Score, Scored, Tokens


class LanguageModel(Protocol):
    """One replica's weights. All ranks of a replica call each method together, with the same arguments.

    Shapes: b rows, V vocabulary.
    """

    @property
    def replica(self) -> int: ...

    @property
    def num_replicas(self) -> int:
        """How many share the requests out; 1 where all ranks answer each of them together."""

    @property
    def device(self) -> torch.device:
        """Of logits and choices."""

    @property
    def context(self) -> int:
        """The most tokens that it reads at once."""

    @property
    def tokens_at_once(self) -> int:
        """How many tokens, padding included, are best asked about in one batch."""

    @property
    def tokens_kept(self) -> int:
        """How many tokens, padding and those to come included, one batch of continuations may have."""

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        """Answer one batch; the same on every rank of the replica."""

    def begin(self, prompts: Sequence[Tokens], num_new_tokens: int) -> Tensor | None:
        """Begin a batch with a row for each prompt; what was begun before is forgotten.

        Args:
            num_new_tokens: at most so many will follow in each row.

        Returns:
            Logits of each row's next token, fp32 [b, V], on the ranks that choose it; None on the others.
        """

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor | None:
        """Go on with these of the rows, in this order, any of them several times, each by a token; as `begin`."""

    def share(self, choice: Tensor) -> Tensor:
        """What was chosen, on all ranks of the replica; those without logits give a tensor of the same kind."""
