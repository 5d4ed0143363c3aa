"""Answering requests with a model: batches of like requests, shared out among the replicas."""

from collections.abc import Iterator, Mapping, Sequence

from trainer import parallel
from trainer.config import UserError
from trainer.inference.generating import OnToken, generate
from trainer.inference.model import LanguageModel
from trainer.inference.requests import Answer, Decoding, Generate, Generated, Request, Score
from trainer.progress import Advance, unheard


def answer(
    model: LanguageModel, requests: Sequence[Request], on_token: OnToken | None = None, advance: Advance = unheard
) -> list[Answer]:
    """The answers, in the order of the requests, on every rank. Collective.

    Args:
        on_token: told of each token of a `Generate` request that follows one beam: as it is chosen where this rank's
            replica does so, and in the end of those of other replicas.
        advance: hears how many of its requests this replica has answered; in long work again and again.

    Raises:
        UserError: a request has no room in the model's context.
    """
    for number, request in enumerate(requests):
        _check(number, request, model.context)
    mine: dict[int, Answer] = {}
    total = -(-len(requests) // model.num_replicas)

    def tick() -> None:
        advance(min(len(mine), total), total)

    scores = {number: request for number, request in enumerate(requests) if isinstance(request, Score)}
    for batch in _shared_out(score_batches(scores, model.tokens_at_once), model):
        mine.update(zip(batch, model.score([scores[number] for number in batch]), strict=True))
        tick()
    others = {number: request for number, request in enumerate(requests) if isinstance(request, Generate)}
    for batch in _shared_out(generate_batches(others, model.tokens_kept), model):
        mine.update(generate(model, {number: others[number] for number in batch}, on_token, tick))
        tick()
    answers = mine | _of_others(model, mine)
    if on_token is not None:
        for number, request in others.items():
            _tell(number, request, answers[number], on_token) if number not in mine else None
    return [answers[number] for number in range(len(requests))]


def _of_others(model: LanguageModel, mine: dict[int, Answer]) -> dict[int, Answer]:
    """The answers of all replicas."""
    if model.num_replicas == 1:
        return {}
    return {
        number: answer
        for theirs in parallel.gather_objects(mine, parallel.data_group())
        for number, answer in theirs.items()
    }


def _tell(number: int, request: Generate, answer: Answer, on_token: OnToken) -> None:
    if isinstance(answer, Generated) and request.decoding.beams == 1:
        for token in answer.tokens:
            on_token(number, token)


def _check(number: int, request: Request, context: int) -> None:
    if isinstance(request, Score):
        first, num_read = request.context, len(request.context) + len(request.continuation) - 1
        is_complete = bool(request.context and request.continuation)
    else:
        first, num_read = request.prompt, len(request.prompt) + request.max_new_tokens
        is_complete = bool(request.prompt) and request.max_new_tokens > 0
    if not is_complete:
        raise UserError(f"request {number} is empty; give at least one token to begin with and one to follow")
    if num_read > context:
        raise UserError(
            f"request {number} has {num_read} tokens to read, {len(first)} of them given, and the model reads at most "
            f"{context}; leave out the first {num_read - context}"
        )


def _shared_out(batches: Sequence[list[int]], model: LanguageModel) -> Sequence[list[int]]:
    return batches[model.replica :: model.num_replicas]


def score_batches(requests: Mapping[int, Score], tokens_at_once: int) -> list[list[int]]:
    """Numbers of requests to be answered together: of like lengths, the longest first."""
    lengths = {number: len(request.context) + len(request.continuation) for number, request in requests.items()}
    return list(batches_of(lengths, tokens_at_once))


def generate_batches(requests: Mapping[int, Generate], tokens_kept: int) -> list[list[int]]:
    """The same, of one way to decode each."""
    lengths: dict[Decoding, dict[int, int]] = {}
    for number, request in requests.items():
        length = (len(request.prompt) + request.max_new_tokens) * request.decoding.beams
        lengths.setdefault(request.decoding, {})[number] = length
    return [batch for like in lengths.values() for batch in batches_of(like, tokens_kept)]


def batches_of(lengths: Mapping[int, int], tokens_at_once: int) -> Iterator[list[int]]:
    """Keys in falling order of length, as many at a time as have room when all are filled up to the longest."""
    batch: list[int] = []
    for number in sorted(lengths, key=lambda number: (-lengths[number], number)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens_at_once:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
