"""Decoding written down as plainly as it can be, one continuation at a time, with no library."""

import math
from collections.abc import Callable, Sequence

from trainer.inference.requests import Decoding, Tokens

NextLogprobs = Callable[[Tokens], Sequence[float]]
"""Nats of every next token after a continuation."""


def plain_greedy(next_logprobs: NextLogprobs, stop_ids: Sequence[int], max_new_tokens: int) -> Tokens:
    tokens: Tokens = ()
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in stop_ids):
        logprobs = next_logprobs(tokens)
        tokens = (*tokens, max(range(len(logprobs)), key=logprobs.__getitem__))
    return tokens


def plain_beams(
    next_logprobs: NextLogprobs, decoding: Decoding, stop_ids: Sequence[int], max_new_tokens: int
) -> Tokens:
    """To the last token, whatever has ended before."""
    live: list[tuple[float, Tokens]] = [(0.0, ())]
    ended: list[tuple[float, Tokens]] = []

    def score(beam: tuple[float, Tokens]) -> float:
        return beam[0] / ((5 + len(beam[1])) / 6) ** decoding.length_penalty

    for _ in range(max_new_tokens):
        candidates = [
            (total + logprob, (*tokens, token))
            for total, tokens in live
            for token, logprob in enumerate(next_logprobs(tokens))
            if logprob > -math.inf
        ]
        candidates.sort(key=lambda beam: -beam[0])
        ended += [beam for beam in candidates[: decoding.beams] if beam[1][-1] in stop_ids]
        going = [beam for beam in candidates if beam[1][-1] not in stop_ids][: decoding.beams]
        if not going:
            return max(ended or live, key=score)[1]
        live = going
    return max([*ended, *live], key=score)[1]


def with_repetition_penalty(logits: Sequence[float], seen: Tokens, penalty: float) -> list[float]:
    """Keskar et al. 2019."""
    return [(x / penalty if x > 0 else x * penalty) if token in seen else x for token, x in enumerate(logits)]


def without_repeated_ngrams(logits: Sequence[float], seen: Tokens, size: int) -> list[float]:
    """Never so many tokens in a row that have stood in a row before."""
    before = {seen[start : start + size] for start in range(len(seen) - size + 1)}
    end = seen[len(seen) - size + 1 :]
    return [-math.inf if len(seen) >= size - 1 and (*end, token) in before else x for token, x in enumerate(logits)]


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]
