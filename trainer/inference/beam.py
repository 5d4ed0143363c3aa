"""Beam search for one continuation: which beams live on, which have ended, and which is the answer.

    search = BeamSearch(decoding, stop_ids, max_new_tokens)
    while not search.is_done:
        logprobs = ...  # of each next token, one row a live beam
        parents = search.advance(search.likeliest(logprobs))  # whose keys and values belong to the live beams now

The rules are those of transformers, but for the length penalty: of each step's likeliest candidates, as many as there
are beams, those that end are set aside, and the likeliest of all others live on. The search is over when no live beam
can come to a better score than the best that has ended (transformers' early_stopping="never"). Beams that the limit
cuts off are answers too.

Shapes: n live beams, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inference.requests import Decoding, Tokens


class Candidate(NamedTuple):
    """A live beam and a token that may follow it."""

    row: int
    token: int
    logprob: float
    """Of the beam with the token."""


@dataclass(frozen=True)
class Beam:
    tokens: Tokens
    """Of the continuation, with the token that ended it."""
    logprob: float
    """Nats, of all of them."""


class BeamSearch:
    """The beams of one request, from the empty continuation to the best."""

    def __init__(self, decoding: Decoding, stop_ids: Iterable[int], max_new_tokens: int) -> None:
        self._beams, self._exponent = decoding.beams, decoding.length_penalty
        self._stop_ids, self._max_new_tokens = frozenset(stop_ids), max_new_tokens
        self._best_ended: Beam | None = None
        self._is_stuck = False
        self.live = [Beam((), 0.0)]
        """The likeliest first, all of one length."""

    @property
    def is_done(self) -> bool:
        num_tokens = len(self.live[0].tokens)
        if self._is_stuck or num_tokens == self._max_new_tokens:
            return True
        if self._best_ended is None:
            return False
        # a log-probability only falls, and what it is divided by is largest at one end of the lengths to come
        divisors = [self._divisor(length) for length in (num_tokens + 1, self._max_new_tokens)]
        return self._score(self._best_ended) >= self.live[0].logprob / max(divisors)

    @property
    def best(self) -> Beam:
        """Of all once the search is done."""
        if self._best_ended is None:
            return max(self.live, key=self._score)
        cut_off = self.live if len(self.live[0].tokens) == self._max_new_tokens else []
        return max([self._best_ended, *cut_off], key=self._score)

    @property
    def num_candidates(self) -> int:
        """How many of the likeliest must be known: each token that ends may come before every beam that goes on."""
        return self._beams * (1 + len(self._stop_ids))

    def likeliest(self, logprobs: Tensor) -> list[Candidate]:
        """The candidates for `advance`.

        Args:
            logprobs: [n, V], nats of each next token after each live beam; -inf: never.
        """
        before = torch.tensor([beam.logprob for beam in self.live], dtype=torch.float64, device=logprobs.device)
        totals = (before[:, None] + logprobs).flatten()
        best = totals.topk(min(self.num_candidates, totals.numel()))
        rows, tokens = best.indices // logprobs.shape[1], best.indices % logprobs.shape[1]
        found = zip(rows.tolist(), tokens.tolist(), best.values.tolist(), strict=True)
        return [Candidate(row, token, total) for row, token, total in found if total > -torch.inf]

    def advance(self, candidates: Sequence[Candidate]) -> list[int]:
        """One token more.

        Args:
            candidates: `num_candidates` of the likeliest, or all there are; the likeliest first.

        Returns:
            For each live beam the row of the last step that it goes on from.
        """
        beams = [Beam((*self.live[each.row].tokens, each.token), each.logprob) for each in candidates]
        ended = [beam for beam in beams[: self._beams] if self._has_ended(beam)]
        if self._best_ended is not None:
            ended.append(self._best_ended)
        self._best_ended = max(ended, key=self._score, default=None)
        going = [place for place, beam in enumerate(beams) if not self._has_ended(beam)][: self._beams]
        self._is_stuck = not going  # every token ends, or is never to come
        if going:
            self.live = [beams[place] for place in going]
        return [candidates[place].row for place in going]

    def _has_ended(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self._stop_ids

    def _score(self, beam: Beam) -> float:
        return beam.logprob / self._divisor(len(beam.tokens))

    def _divisor(self, num_tokens: int) -> float:
        return ((5 + num_tokens) / 6) ** self._exponent  # Wu et al. 2016, equation 14
