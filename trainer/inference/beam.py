"""Beam search for one continuation: which beams live on, which have ended, and which is the answer.

    search = BeamSearch(decoding, stop_ids, max_new_tokens)
    while not search.is_done:
        search.advance(next_logprobs(search.live))  # one row a live beam; search.parents says whose cache goes where
    search.best

The search is that of Tensor2Tensor, with which T5 was measured, and with its parameters GPT-3 (Brown et al. 2020, 2.4):
of each step's 2 x beams likeliest candidates, those that end are set aside, and the likeliest of the others live on;
it is over when no live beam can come to a better score than the best that has ended. Beams that are cut off by the
limit are an answer only where none has ended.

Shapes: n live beams, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.inference.requests import Decoding, Tokens


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
        self.parents = [0]
        """For each live beam, the row of the last step that it goes on from."""

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
        """Of all so far; of the whole search once it is done."""
        return self._best_ended or max(self.live, key=self._score)

    def advance(self, logprobs: Tensor) -> None:
        """One token more.

        Args:
            logprobs: [n, V], nats of each next token after each live beam; -inf: never.
        """
        before = torch.tensor([beam.logprob for beam in self.live], dtype=torch.float64)
        totals = (before[:, None].to(logprobs.device) + logprobs.double()).flatten()
        ends = torch.tensor(sorted(self._stop_ids), dtype=torch.long, device=logprobs.device)
        rows = torch.arange(len(logprobs), device=logprobs.device) * logprobs.shape[1]
        goes_on = totals.index_fill(0, (rows[:, None] + ends).flatten(), -torch.inf)
        ended = [beam for _, beam in self._top(totals, logprobs.shape[1], 2 * self._beams) if self._has_ended(beam)]
        going = self._top(goes_on, logprobs.shape[1], self._beams)
        candidates = ended if self._best_ended is None else [self._best_ended, *ended]
        self._best_ended = max(candidates, key=self._score, default=None)
        if going:
            self.parents, self.live = [row for row, _ in going], [beam for _, beam in going]
        self._is_stuck = not going  # every token ends, or is never to come

    def _top(self, totals: Tensor, vocab_size: int, count: int) -> list[tuple[int, Beam]]:
        best = totals.topk(min(count, totals.numel()))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        places = ((*divmod(place, vocab_size), value) for place, value in found if value > -torch.inf)
        return [(row, Beam((*self.live[row].tokens, token), value)) for row, token, value in places]

    def _has_ended(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self._stop_ids

    def _score(self, beam: Beam) -> float:
        return beam.logprob / self._divisor(len(beam.tokens))

    def _divisor(self, num_tokens: int) -> float:
        return ((5 + num_tokens) / 6) ** self._exponent  # Wu et al. 2016, equation 14
