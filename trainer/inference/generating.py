"""Continuations of one batch of prompts, all by the same `Decoding`.

Every rank of a replica keeps the same account of the rows; only what follows from logits is chosen on the ranks that
have them, and shared.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainer.inference.beam import BeamSearch, Candidate
from trainer.inference.decoding import choose, log_probabilities, stream
from trainer.inference.model import LanguageModel
from trainer.inference.requests import Generate, Generated
from trainer.progress import unheard

OnToken = Callable[[int, int], None]
"""Told of a request's number and its next token."""


def generate(
    model: LanguageModel,
    requests: Mapping[int, Generate],
    on_token: OnToken | None = None,
    tick: Callable[[], None] = unheard,
) -> dict[int, Generated]:
    """Answers by the requests' numbers. Collective in a replica.

    Args:
        requests: by their numbers, all with the same decoding.
        on_token: is not told of tokens of beams, which may yet be given up.
        tick: is called with every token.
    """
    if next(iter(requests.values())).decoding.beams > 1:
        return _search(model, requests, tick)
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
        tick()
        logits = model.step(kept, [tokens[row] for row in kept])


def _begin(model: LanguageModel, requests: Mapping[int, Generate]) -> Tensor | None:
    prompts = [request.prompt for request in requests.values()]
    return model.begin(prompts, max(request.max_new_tokens for request in requests.values()))


def _has_ended(request: Generate, tokens: list[int]) -> bool:
    return len(tokens) == request.max_new_tokens or tokens[-1] in request.stop_ids


# --------------------------------------------------------------------------------------------------------------- beams


def _search(model: LanguageModel, requests: Mapping[int, Generate], tick: Callable[[], None]) -> dict[int, Generated]:
    searches = {
        number: BeamSearch(request.decoding, request.stop_ids, request.max_new_tokens)
        for number, request in requests.items()
    }
    going = dict(searches)
    logits = _begin(model, requests)
    while True:
        rows, tokens, first = list[int](), list[int](), 0
        for search, candidates in zip(going.values(), _candidates(model, requests, going, logits), strict=True):
            num_beams = len(search.live)
            parents = search.advance(candidates)
            if not search.is_done:
                rows += [first + parent for parent in parents]
                tokens += [beam.tokens[-1] for beam in search.live]
            first += num_beams
        going = {number: search for number, search in going.items() if not search.is_done}
        if not going:
            return {number: Generated(search.best.tokens) for number, search in searches.items()}
        tick()
        logits = model.step(rows, tokens)


def _candidates(
    model: LanguageModel, requests: Mapping[int, Generate], searches: Mapping[int, BeamSearch], logits: Tensor | None
) -> list[list[Candidate]]:
    """Of each search the likeliest, the same on every rank of the replica."""
    widest = max(search.num_candidates for search in searches.values())
    table = torch.full((3, len(searches), widest), -torch.inf, dtype=torch.float64, device=model.device)
    if logits is not None:
        histories = [
            [*requests[number].prompt, *beam.tokens] for number, search in searches.items() for beam in search.live
        ]
        decoding = next(iter(requests.values())).decoding
        parts = log_probabilities(logits, decoding, histories).split([len(each.live) for each in searches.values()])
        for place, (search, logprobs) in enumerate(zip(searches.values(), parts, strict=True)):
            found = torch.tensor(search.likeliest(logprobs), dtype=torch.float64, device=model.device)
            table[:, place, : len(found)] = found.t()
    shared: list[list[list[float]]] = model.share(table).permute(1, 2, 0).tolist()
    return [
        [Candidate(int(row), int(token), logprob) for row, token, logprob in rows if logprob > -torch.inf]
        for rows in shared
    ]
