"""Continuations of one batch of prompts, all by the same `Decoding`.

Every rank of a replica keeps the same account of the rows; only what follows from logits is chosen on the ranks that
have them, and shared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.inference.decoding import choose, length_normalized, log_probabilities, stream
from trainer.inference.model import LanguageModel
from trainer.inference.requests import Generate, Generated, Tokens

OnToken = Callable[[int, int], None]
"""Told of a request's number and its next token."""


def generate(
    model: LanguageModel, requests: Mapping[int, Generate], on_token: OnToken | None = None
) -> dict[int, Generated]:
    """Answers by the requests' numbers. Collective in a replica.

    Args:
        requests: by their numbers, all with the same decoding.
        on_token: is not told of tokens of beams, which may yet be given up.
    """
    if next(iter(requests.values())).decoding.beams > 1:
        return _search(model, requests)
    decoding = next(iter(requests.values())).decoding
    rows, found = list(requests), {number: list[int]() for number in requests}
    streams = {number: stream(decoding.seed, number) for number in requests}
    logits = _begin(model, requests)
    while True:
        choice = torch.zeros(len(rows), dtype=torch.int64, device=model.device)
        if logits is not None:
            histories = [[*requests[number].prompt, *found[number]] for number in rows]
            choice = choose(logits, decoding, histories, [streams[number] for number in rows])
        tokens: list[int] = model.share(choice).tolist()
        for number, token in zip(rows, tokens, strict=True):
            found[number].append(token)
            if on_token is not None:
                on_token(number, token)
        kept = [row for row, number in enumerate(rows) if not _has_ended(requests[number], found[number])]
        if not kept:
            return {number: Generated(tuple(tokens)) for number, tokens in found.items()}
        rows = [rows[row] for row in kept]
        logits = model.step(kept, [tokens[row] for row in kept])


def _begin(model: LanguageModel, requests: Mapping[int, Generate]) -> Tensor | None:
    prompts = [request.prompt for request in requests.values()]
    return model.begin(prompts, max(request.max_new_tokens for request in requests.values()))


def _has_ended(request: Generate, tokens: list[int]) -> bool:
    return len(tokens) == request.max_new_tokens or tokens[-1] in request.stop_ids


# --------------------------------------------------------------------------------------------------------------- beams


@dataclass(frozen=True)
class Candidate:
    """A beam and a token that may follow it."""

    beam: int
    token: int
    logprob: float
    """Of the beam with the token."""


@dataclass
class Search:
    """The beams of one request: as many as are followed at once, fewer as long as there are not so many."""

    request: Generate
    beams: list[tuple[float, Tokens]] = field(default_factory=lambda: [(0.0, ())])
    """Log-probability and tokens of those that go on."""
    finished: list[tuple[float, Tokens]] = field(default_factory=list)
    """Those that have come to a stop, by normalized log-probability."""

    @property
    def num_candidates(self) -> int:
        """How many of the likeliest must be known: every beam might be stopped by every stop token."""
        return self.request.decoding.beams * (1 + len(self.request.stop_ids))

    @property
    def is_over(self) -> bool:
        """As many have come to a stop as were to be followed, or all are as long as they may be."""
        beams = self.request.decoding.beams
        return not self.beams or len(self.finished) >= beams or len(self.beams[0][1]) == self.request.max_new_tokens

    @property
    def best(self) -> Tokens:
        whole = [(self._normalized(*beam), beam[1]) for beam in self.beams]
        return max([*self.finished, *whole], key=lambda each: each[0])[1]

    def advance(self, candidates: list[Candidate]) -> list[int]:
        """Go on with the best of the candidates, which come from the likeliest to the least likely.

        Of stop tokens only those count that are among as many as are followed at once.

        Returns:
            Of each beam that goes on, the number of that from which it came.
        """
        width, beams, parents = self.request.decoding.beams, list[tuple[float, Tokens]](), list[int]()
        for rank, each in enumerate(candidates):
            tokens = (*self.beams[each.beam][1], each.token)
            if each.token in self.request.stop_ids:
                if rank < width:
                    self.finished.append((self._normalized(each.logprob, tokens), tokens))
            elif len(beams) < width:
                beams.append((each.logprob, tokens))
                parents.append(each.beam)
        self.beams = beams
        return parents

    def _normalized(self, logprob: float, tokens: Tokens) -> float:
        return length_normalized(logprob, len(tokens), self.request.decoding.length_penalty)


def _search(model: LanguageModel, requests: Mapping[int, Generate]) -> dict[int, Generated]:
    searches = {number: Search(request) for number, request in requests.items()}
    going = list(searches.values())
    logits = _begin(model, requests)
    while True:
        rows, tokens, first = list[int](), list[int](), 0
        for search, candidates in zip(going, _candidates(model, going, logits), strict=True):
            num_beams = len(search.beams)
            parents = search.advance(candidates)
            if not search.is_over:
                rows += [first + parent for parent in parents]
                tokens += [beam[1][-1] for beam in search.beams]
            first += num_beams
        going = [search for search in going if not search.is_over]
        if not going:
            return {number: Generated(search.best) for number, search in searches.items()}
        logits = model.step(rows, tokens)


def _candidates(model: LanguageModel, searches: list[Search], logits: Tensor | None) -> list[list[Candidate]]:
    """Of each search the likeliest, the same on every rank of the replica."""
    widest = max(search.num_candidates for search in searches)
    table = torch.full((3, len(searches), widest), -torch.inf, dtype=torch.float64, device=model.device)
    if logits is not None:
        histories = [[*search.request.prompt, *beam[1]] for search in searches for beam in search.beams]
        logprobs = log_probabilities(logits, searches[0].request.decoding, histories)
        sums = [beam[0] for search in searches for beam in search.beams]
        totals = logprobs + torch.tensor(sums, dtype=torch.float64, device=logits.device)[:, None]
        parts = totals.split([len(search.beams) for search in searches])
        for number, (search, part) in enumerate(zip(searches, parts, strict=True)):
            top = part.flatten().topk(min(search.num_candidates, part.numel()))
            beams, tokens = top.indices // part.shape[1], top.indices % part.shape[1]
            table[:, number, : len(tokens)] = torch.stack([top.values, beams.double(), tokens.double()])
    found: list[list[list[float]]] = model.share(table).permute(1, 2, 0).tolist()
    return [
        [Candidate(int(beam), int(token), logprob) for logprob, beam, token in rows if logprob > -torch.inf]
        for rows in found
    ]
