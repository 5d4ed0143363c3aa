"""What may follow and what is drawn: tables, transformers' own processors, and beams against all there is."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as theirs

from trainer.inference import decoding
from trainer.inference.generating import generate
from trainer.inference.requests import Decoding, Generate, Score, Scored, Tokens

INF = float("inf")


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


# -------------------------------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize(
    ("history", "size", "expected"),
    [
        ([], 1, set()),
        ([4], 1, {4}),
        ([4, 2, 4], 1, {2, 4}),
        ([4, 2], 2, set()),
        ([4, 2, 4], 2, {2}),
        ([4, 2, 4, 3, 4], 2, {2, 3}),
        ([1, 1], 2, {1}),
        ([1, 2, 3, 1, 2], 3, {3}),
        ([1, 2], 3, set()),
        ([5], 3, set()),
    ],
)
def test_what_would_repeat(history: list[int], size: int, expected: set[int]) -> None:
    assert decoding.repeats(history, size) == expected


def test_where_everything_would_repeat_all_may_follow() -> None:
    logits = rows([1.0, 2.0], [1.0, 2.0])
    left = decoding.without_repeats(logits, 1, [[0, 1], [1]])
    assert left.tolist() == [[1.0, 2.0], [1.0, -INF]]


def test_a_penalty_makes_seen_tokens_less_likely_on_either_side_of_zero() -> None:
    left = decoding.penalized(rows([2.0, -2.0, 2.0, -2.0]), 2.0, [[0, 1, 1]])
    assert left.tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    ("k", "expected"),
    [(None, [3, 1, 2]), (1, [3, -INF, -INF]), (2, [3, -INF, 2]), (3, [3, 1, 2]), (9, [3, 1, 2])],
)
def test_the_k_likeliest(k: int | None, expected: list[float]) -> None:
    assert decoding.among_top_k(rows([3.0, 1.0, 2.0]), k).tolist() == [expected]


@pytest.mark.parametrize(
    ("p", "kept"), [(None, "0123"), (0.01, "2"), (0.49, "2"), (0.51, "02"), (0.79, "02"), (0.81, "012"), (1.0, "0123")]
)
def test_the_fewest_with_probability_p(p: float | None, kept: str) -> None:
    logits = rows([0.3, 0.15, 0.5, 0.05]).log()
    left = decoding.among_top_p(logits, p)[0]
    assert [str(token) for token in range(4) if left[token] > -INF] == list(kept)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_tokens=st.integers(1, 40))
def test_they_are_those_of_transformers(seed: int, num_tokens: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, num_tokens, generator=draw)
    histories = torch.randint(num_tokens, (4, 30), generator=draw)
    lists = histories.tolist()
    penalty, size, k, p = 1.3, 1 + seed % 4, 1 + seed % 7, 0.05 + seed % 90 / 100
    penalized = theirs.RepetitionPenaltyLogitsProcessor(penalty)(histories, logits)
    torch.testing.assert_close(decoding.penalized(logits, penalty, lists), penalized, rtol=0, atol=0)
    blocked = theirs.NoRepeatNGramLogitsProcessor(size)(histories, logits)
    mine = decoding.without_repeats(logits, size, lists)
    for row, expected, before in zip(mine, blocked, logits, strict=True):
        torch.testing.assert_close(row, expected if expected.max() > -INF else before, rtol=0, atol=0)
    torch.testing.assert_close(decoding.among_top_k(logits, k), theirs.TopKLogitsWarper(k)(histories, logits))
    torch.testing.assert_close(decoding.among_top_p(logits, p), theirs.TopPLogitsWarper(p)(histories, logits))


# ------------------------------------------------------------------------------------------------------- what is drawn


def test_each_token_has_its_share_of_the_numbers() -> None:
    logits = rows([0.0, 0.5, 0.25, 0.25]).log()
    numbers = [0.0, 0.49999, 0.50001, 0.74999, 0.75001, 1 - 2**-53]
    assert decoding.drawn(logits.expand(6, -1), numbers).tolist() == [1, 1, 2, 2, 3, 3]


def test_the_last_number_draws_no_token_that_was_left_out() -> None:
    logits = rows([0.1, 0.2, 0.3, 0.4, 0.0]).log() + 5
    assert decoding.drawn(logits, [1 - 2**-53]).tolist() == [3]


def test_tokens_are_as_frequent_as_they_are_likely() -> None:
    logits = rows([0.5, 0.3, 0.2, 0.0]).log()
    streams = [decoding.stream(1, number) for number in range(4000)]
    how = Decoding(temperature=1.0)
    counts = Counter(decoding.choose(logits.expand(4000, -1), how, [[0]] * 4000, streams).tolist())
    assert counts.keys() == {0, 1, 2}
    for token, share in enumerate([0.5, 0.3, 0.2]):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)  # four standard deviations


def test_temperature_sharpens() -> None:
    logits = rows([1.0, 0.0])
    for temperature in (0.2, 1.0, 3.0):
        streams = [decoding.stream(2, number) for number in range(2000)]
        how = Decoding(temperature=temperature)
        share = (decoding.choose(logits.expand(2000, -1), how, [[0]] * 2000, streams) == 0).double().mean().item()
        assert share == pytest.approx(1 / (1 + math.exp(-1 / temperature)), abs=0.045)


def test_without_temperature_nothing_is_drawn() -> None:
    assert decoding.choose(rows([1.0, 3.0, 2.0]), Decoding(top_k=3), [[0]], []).tolist() == [1]


def test_streams_are_one_for_each_request_and_seed() -> None:
    first = {(seed, number): decoding.stream(seed, number).random() for seed in range(12) for number in range(112)}
    assert len(set(first.values())) == len(first)
    assert decoding.stream(3, 4).random() == first[3, 4]


# ---------------------------------------------------------------------------------------------------------------- beams


class Table:
    """A model of five tokens whose logits follow from the last two; a `trainer.inference.model.LanguageModel`."""

    replica, num_replicas, context, tokens_at_once, tokens_kept = 0, 1, 100, 100, 100
    device = torch.device("cpu")
    vocab_size = 5

    def __init__(self, seed: int) -> None:
        self.table = 2 * torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(seed))
        self._rows: list[Tokens] = []

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        raise NotImplementedError

    def begin(self, prompts: Sequence[Tokens], num_new_tokens: int) -> Tensor:
        self._rows = list(prompts)
        return self._logits()

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self._rows = [(*self._rows[row], token) for row, token in zip(rows, tokens, strict=True)]
        return self._logits()

    def share(self, choice: Tensor) -> Tensor:
        return choice

    def _logits(self) -> Tensor:
        return torch.stack([self.table[row[-2], row[-1]] for row in self._rows])

    def logprob(self, prompt: Tokens, continuation: Tokens) -> float:
        text, total = prompt, 0.0
        for token in continuation:
            logits = self.table[text[-2], text[-1]].tolist()
            total += logits[token] - math.log(math.fsum(map(math.exp, logits)))
            text = (*text, token)
        return total


def all_continuations(num_tokens: int, stops: Tokens) -> list[Tokens]:
    """Those that end at the first stop token, or have as many tokens as there may be."""
    found: list[Tokens] = []
    for length in range(1, num_tokens + 1):
        for tokens in itertools.product(range(5), repeat=length):
            has_ended = tokens[-1] in stops or length == num_tokens
            if has_ended and not set(tokens[:-1]) & set(stops):
                found.append(tokens)
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("stops", [(), (4,), (0, 3)])
def test_beams_enough_for_all_find_the_best_of_all(penalty: float, stops: Tokens) -> None:
    prompts = [(1, 2), (3, 0), (2, 2)]
    for seed in range(5):
        model = Table(seed)
        how = Decoding(beams=5**4, length_penalty=penalty)
        requests = {number: Generate(prompt, 4, stops, how) for number, prompt in enumerate(prompts)}
        found = generate(model, requests)
        for number, prompt in enumerate(prompts):

            def value(tokens: Tokens, model: Table = model, prompt: Tokens = prompt) -> float:
                return model.logprob(prompt, tokens) / ((5 + len(tokens)) / 6) ** penalty

            assert found[number].tokens == max(all_continuations(4, stops), key=value)


def test_more_beams_find_no_less() -> None:
    """And one beam, by this way, is what the likeliest tokens are."""
    better = 0
    for seed in range(20):
        model, prompt = Table(seed), (0, 1)
        likeliest = generate(model, {0: Generate(prompt, 5)})[0].tokens
        wide = generate(model, {0: Generate(prompt, 5, (), Decoding(beams=5))})[0].tokens
        assert model.logprob(prompt, wide) >= model.logprob(prompt, likeliest) - 1e-9
        better += model.logprob(prompt, wide) > model.logprob(prompt, likeliest) + 1e-6
    assert better > 3


def test_a_request_ends_when_as_many_beams_as_were_followed_have_stopped() -> None:
    """Token 4 follows with nearly all probability, so that both beams stop at once, long before the last token."""
    model = Table(0)
    model.table[...] = torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0])
    how = Decoding(beams=2, length_penalty=0.0)
    assert generate(model, {0: Generate((0, 1), 50, (4,), how)})[0].tokens == (4,)
    assert len(model._rows[0]) <= 2 + 2


def test_beams_repeat_no_ngrams() -> None:
    for seed in range(10):
        how = Decoding(beams=3, no_repeat_ngram=2)
        text = (0, 1, *generate(Table(seed), {0: Generate((0, 1), 12, (), how)})[0].tokens)
        pairs = list(itertools.pairwise(text))
        assert len(set(pairs)) == len(pairs)
