"""From logits to the next token: what may follow, what is drawn, which beams go on.

The order is that of transformers: repetition penalty, repeated n-grams, temperature, top-k, top-p.

Shapes: b rows, V vocabulary.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.inference.requests import Decoding


def stream(seed: int, request: int) -> random.Random:
    """What a request draws from."""
    return random.Random(f"{seed}/{request}")


def choose(
    logits: Tensor, decoding: Decoding, histories: Sequence[Sequence[int]], streams: Sequence[random.Random]
) -> Tensor:
    """The next token of each row [b]: the likeliest, or one that is drawn.

    Args:
        logits: fp32 [b, V].
        histories: prompt and continuation of each row so far.
        streams: of each row.
    """
    logits = penalized(logits, decoding.repetition_penalty, histories)
    logits = without_repeats(logits, decoding.no_repeat_ngram, histories)
    if decoding.temperature == 0:
        return logits.argmax(-1)
    logits = among_top_p(among_top_k(logits / decoding.temperature, decoding.top_k), decoding.top_p)
    return drawn(logits, [stream.random() for stream in streams])


def log_probabilities(logits: Tensor, decoding: Decoding, histories: Sequence[Sequence[int]]) -> Tensor:
    """For beams: fp64 [b, V], -inf for what may not follow, whose part is not given to others."""
    logits = penalized(logits, decoding.repetition_penalty, histories)
    return without_repeats(logits.double().log_softmax(-1), decoding.no_repeat_ngram, histories)


def penalized(logits: Tensor, penalty: float, histories: Sequence[Sequence[int]]) -> Tensor:
    """Tokens that have come before made less likely (more, if the penalty is below 1)."""
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, history in zip(logits, histories, strict=True):
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


def without_repeats(logits: Tensor, size: int, histories: Sequence[Sequence[int]]) -> Tensor:
    """-inf where a token would end an n-gram of this size that has come before; all stay if none else would."""
    if size == 0:
        return logits
    logits = logits.clone()
    for row, history in zip(logits, histories, strict=True):
        before = row.clone()
        row[sorted(repeats(history, size))] = -torch.inf
        if row.max() == -torch.inf:
            row.copy_(before)
    return logits


def repeats(history: Sequence[int], size: int) -> set[int]:
    """Tokens that have followed the last size - 1 ones before."""
    tail = list(history[len(history) - size + 1 :])
    return {
        history[start + size - 1]
        for start in range(len(history) - size + 1)
        if list(history[start : start + size - 1]) == tail
    }


def among_top_k(logits: Tensor, k: int | None) -> Tensor:
    """-inf but for the k likeliest, and those as likely as the last of them."""
    if k is None or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def among_top_p(logits: Tensor, p: float | None) -> Tensor:
    """-inf but for the fewest likeliest that together have probability p."""
    if p is None or p >= 1:
        return logits
    ascending, order = logits.sort(dim=-1)
    is_left_out = ascending.softmax(-1).cumsum(-1) <= 1 - p
    is_left_out[:, -1] = False
    return logits.masked_fill(is_left_out.scatter(1, order, is_left_out), -torch.inf)


def drawn(logits: Tensor, numbers: Sequence[float]) -> Tensor:
    """The token [b] in whose part of [0, 1) each row's number lies, when all are laid side by side in their order."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1]
    at = torch.tensor(numbers, dtype=torch.float64, device=logits.device) * total
    at = torch.minimum(at, total.nextafter(torch.zeros_like(total)))  # or rounding might lead beyond the last token
    return torch.searchsorted(cumulative, at[:, None], right=True).squeeze(1)
