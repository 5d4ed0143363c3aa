"""Beam search against one that is written down plainly, and against all continuations there are."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plain_decoding import NextLogprobs, log_softmax, plain_beams, plain_greedy
from trainer.inference.beam import BeamSearch
from trainer.inference.requests import Decoding, Tokens


def language(seed: int, vocab_size: int) -> NextLogprobs:
    """A made-up model, in which each continuation has probabilities of its own."""

    def next_logprobs(tokens: Tokens) -> list[float]:
        draw = random.Random(f"{seed} {tokens}")
        return log_softmax([draw.gauss(0, 2) for _ in range(vocab_size)])

    return next_logprobs


def searched(
    next_logprobs: Callable[[Tokens], object], decoding: Decoding, stop_ids: Tokens, max_new_tokens: int
) -> BeamSearch:
    search = BeamSearch(decoding, stop_ids, max_new_tokens)
    while not search.is_done:
        before = search.live
        parents = search.advance(search.likeliest(torch.tensor([next_logprobs(beam.tokens) for beam in before])))
        if parents:
            assert [before[parent].tokens for parent in parents] == [beam.tokens[:-1] for beam in search.live]
    return search


@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(3, 9),
    beams=st.integers(2, 5),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0, -0.5]),
    num_stops=st.integers(0, 3),
    max_new_tokens=st.integers(1, 7),
)
def test_finds_what_the_plain_search_finds(
    seed: int, vocab_size: int, beams: int, length_penalty: float, num_stops: int, max_new_tokens: int
) -> None:
    """Which goes on to the last token: that this one stops when nothing better can come changes no answer."""
    decoding, stop_ids = Decoding(beams=beams, length_penalty=length_penalty), tuple(range(num_stops))
    model = language(seed, vocab_size)
    expected = plain_beams(model, decoding, stop_ids, max_new_tokens)
    assert searched(model, decoding, stop_ids, max_new_tokens).best.tokens == expected


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 3.0])
def test_with_a_beam_for_each_it_finds_the_best_of_all(length_penalty: float) -> None:
    vocab_size, max_new_tokens, stop = 4, 4, 2
    model = language(5, vocab_size)
    totals: dict[Tokens, float] = {(): 0.0}
    for length in range(max_new_tokens):
        for tokens in itertools.product(range(vocab_size), repeat=length):
            if stop not in tokens:
                totals |= {(*tokens, token): totals[tokens] + x for token, x in enumerate(model(tokens))}
    best = max(
        (tokens for tokens in totals if len(tokens) == max_new_tokens or tokens[-1:] == (stop,)),
        key=lambda tokens: totals[tokens] / ((5 + len(tokens)) / 6) ** length_penalty,
    )
    decoding = Decoding(beams=vocab_size**max_new_tokens, length_penalty=length_penalty)
    found = searched(model, decoding, (stop,), max_new_tokens).best
    assert (found.tokens, found.logprob) == (best, pytest.approx(totals[best], rel=1e-6))


@pytest.mark.parametrize(
    ("length_penalty", "goes_on", "is_long"),
    [
        (0.0, 0.49, False),
        (0.6, 0.49, True),
        # by ((5 + 5) / 6)^0.6, which is 1.359: what takes five tokens may be that much less likely, in nats
        (0.6, math.exp(1.33 * math.log(0.5)), True),
        (0.6, math.exp(1.39 * math.log(0.5)), False),
        # further behind at two tokens than five will make good
        (2.0, math.exp(2.7 * math.log(0.5)), True),
    ],
)
def test_the_penalty_decides_between_short_and_long(length_penalty: float, goes_on: float, is_long: bool) -> None:
    """Ends at once at 0.5, or goes on to end for sure at the fifth token."""

    def model(tokens: Tokens) -> list[float]:
        if tokens == ():
            return [math.log(goes_on), math.log(0.5), math.log(0.5 - goes_on)]
        ends = tokens[0] == 0 and len(tokens) == 4
        return log_softmax([0.0, 20.0, 0.0] if ends else [20.0, 0.0, 0.0] if tokens[0] == 0 else [0.0, 0.0, 0.0])

    found = searched(model, Decoding(beams=2, length_penalty=length_penalty), (1,), 6).best.tokens
    assert found == ((0, 0, 0, 0, 1) if is_long else (1,))


def test_it_is_over_when_nothing_better_can_come() -> None:
    steps = 0

    def model(tokens: Tokens) -> list[float]:
        nonlocal steps
        steps += 1
        return log_softmax([0.0, 9.0, 0.0])

    assert searched(model, Decoding(beams=2), (1,), 1000).best.tokens == (1,)
    assert steps < 10


def test_what_is_cut_off_is_an_answer_too() -> None:
    def model(tokens: Tokens) -> list[float]:
        return [math.log(0.7), math.log(0.3)] if tokens == () else [math.log(0.99), math.log(0.01)]

    assert searched(model, Decoding(beams=2), (1,), 5).best.tokens == (0,) * 5
    assert len(searched(language(3, 6), Decoding(beams=3), (), 5).best.tokens) == 5


def test_what_was_not_cut_off_is_none() -> None:
    """A text that ends as likely as not at its second token, whose beginning is likelier than all of it."""

    def model(tokens: Tokens) -> list[float]:
        return [math.log(0.98), -math.inf, math.log(0.02)] if len(tokens) == 0 else [-9.0, math.log(0.5), -9.0]

    assert searched(model, Decoding(beams=2), (1,), 50).best.tokens == (0, 1)


def test_a_beam_that_can_go_nowhere_is_the_answer_so_far() -> None:
    def model(tokens: Tokens) -> list[float]:
        return [-math.inf] * 3 if len(tokens) == 2 else log_softmax([1.0, 2.0, 0.0])

    assert searched(model, Decoding(beams=2), (), 9).best.tokens == (1, 1)


def test_one_beam_is_greedy() -> None:
    model = language(11, 12)
    expected = plain_greedy(model, (), 6)
    assert searched(model, Decoding(beams=1), (), 6).best.tokens == expected
