"""Requests into batches, and batches into answers in the order of the requests."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.config import UserError
from trainer.inference.answering import answer, batches_of, generate_batches
from trainer.inference.cache import attend_from_start, band
from trainer.inference.requests import Decoding, Generate, Generated, Request, Score, Scored, Tokens


class Echo:
    """A `trainer.inference.model.LanguageModel` after each of whose tokens the next higher one follows."""

    replica, num_replicas, context, tokens_at_once, tokens_kept = 0, 1, 12, 20, 30
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.scored: list[int] = []
        self.begun: list[int] = []
        self._last: list[int] = []

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        self.scored.append(len(requests))
        return [Scored(tuple(float(-token) for token in request.continuation), True) for request in requests]

    def begin(self, prompts: Sequence[Tokens], num_new_tokens: int) -> Tensor:
        self.begun.append(len(prompts))
        self._last = [prompt[-1] for prompt in prompts]
        return self._logits()

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self._last = list(tokens)
        return self._logits()

    def share(self, choice: Tensor) -> Tensor:
        return choice

    def _logits(self) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self._last) + 1, 100).float() * 50


def test_answers_come_in_the_order_of_requests_of_every_kind_and_way() -> None:
    drawn = Decoding(temperature=0.5)
    requests: list[Request] = [
        Generate((5,), 3),
        Score((1, 2), (3,)),
        Generate((7, 8), 10, (11, 40), drawn),
        Score((1,), (9, 4)),
        Generate((20,), 11, (), Decoding(beams=2)),
        Generate((30, 1, 30), 2, (), drawn),
    ]
    assert answer(Echo(), requests) == [
        Generated((6, 7, 8)),
        Scored((-3.0,), True),
        Generated((9, 10, 11)),
        Scored((-9.0, -4.0), True),
        Generated(tuple(range(21, 32))),
        Generated((31, 32)),
    ]


def test_like_requests_are_asked_together() -> None:
    model = Echo()
    answer(model, [*(Score((1,) * 3, (2,)) for _ in range(12)), *(Generate((1,), 4) for _ in range(7))])
    assert model.scored == [5, 5, 2] and model.begun == [6, 1]
    model = Echo()
    answer(model, [Generate((1,), 4, (), Decoding(temperature=1.0, seed=number % 2)) for number in range(6)])
    assert model.begun == [3, 3]
    assert generate_batches(
        {4: Generate((1,), 4, (), Decoding(beams=3)), 9: Generate((1,), 4, (), Decoding(beams=3))}, 29
    ) == [[4], [9]]


@given(lengths=st.dictionaries(st.integers(0, 50), st.integers(1, 30), max_size=20), room=st.integers(1, 60))
def test_batches_hold_each_request_once_and_have_room(lengths: dict[int, int], room: int) -> None:
    batches = list(batches_of(lengths, room))
    assert sorted(number for batch in batches for number in batch) == sorted(lengths)
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or longest * len(batch) <= room
    order = [lengths[number] for batch in batches for number in batch]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Score((), (1,)), "request 1 is empty"),
        (Score((1,), ()), "request 1 is empty"),
        (Generate((), 3), "request 1 is empty"),
        (Generate((1,), 0), "request 1 is empty"),
        (Score((1,) * 9, (2,) * 5), "request 1 has 13 tokens to read, 9 of them given, .* at most 12; .* first 1$"),
        (Generate((1,) * 9, 5), "request 1 has 14 tokens to read, 9 of them given, .* at most 12; .* first 2$"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_number(request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        answer(Echo(), [Score((1,) * 8, (2,) * 5), request_])


def test_a_mask_sees_what_the_banded_kernel_sees() -> None:
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(2, 11, 2, 2, 8, generator=draw)
    key, value = (torch.randn(2, 11, 2, 8, generator=draw) for _ in range(2))
    for window in (1, 3, 4, 11, 20):
        by_kernel = attend_from_start(query, key, value, window)
        by_mask = attend_from_start(query, key, value, None, band(11, window, query.device))
        torch.testing.assert_close(by_kernel, by_mask, rtol=0, atol=1e-6)
