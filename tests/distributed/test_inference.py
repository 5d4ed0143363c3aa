"""Scores and continuations in every layout for inference, against a plain model that keeps nothing in a cache."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from answering_models import MODELS, SEQ, VOCAB, checkpoint_of, config_of, reference_of
from ranks import run_on_ranks
from trainer.config import RunConfig
from trainer.inference.answering import answer
from trainer.inference.cached import CachedModel
from trainer.inference.layout import inference_config
from trainer.inference.requests import Answer, Request, Score, Scored

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "PP4": {"pipeline": 4},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "DP2": {"data": 2},
    "TP2 SP x CP2 ZeRO-3": {"tensor": 2, "sequence": True, "context": 2, "zero": 3},
    "PP2 interleaved x DP2": {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: checkpoint_of(family, folder) for family in MODELS}


def answers_of(
    checkpoints: dict[str, Path], requests: dict[str, list[Request]]
) -> Callable[[RunConfig, torch.device], Any]:
    """Each rank's, by family."""

    def rank(config: RunConfig, device: torch.device) -> dict[str, list[Answer]]:
        found = {}
        for family, asked in requests.items():
            own = inference_config(config_of(family, config.parallel.model_dump()))
            found[family] = answer(CachedModel(own, checkpoints[family], device), asked)
        return found

    return rank


def layout_of(name: str) -> RunConfig:
    """How many ranks and in which groups; of no family in particular."""
    return inference_config(config_of("GPT-2", LAYOUTS[name]))


# ------------------------------------------------------------------------------------------------------------ scoring


def score_requests() -> list[Score]:
    """Of all lengths up to the longest, as chance has it; some go on as the model would."""
    draw = random.Random(6)
    lengths = [(1, 1), (1, SEQ), (SEQ, 1), *((n := draw.randint(1, 20), draw.randint(1, SEQ - n)) for _ in range(30))]
    return [
        Score(*(tuple(draw.randrange(VOCAB) for _ in range(length)) for length in lengths_of_one))
        for lengths_of_one in lengths
    ]


@torch.no_grad()
def plain_scores(family: str, requests: list[Score]) -> list[Scored]:
    """One request at a time, in double precision."""
    model, found = reference_of(family).double(), []
    for request in requests:
        whole = torch.tensor([*request.context, *request.continuation])
        logits = model(whole[None, :-1])[0, len(request.context) - 1 :].double()
        targets = whole[len(request.context) :]
        logprobs = logits.log_softmax(-1)[range(len(targets)), targets]
        found.append(Scored(tuple(logprobs.tolist()), bool((logits.argmax(-1) == targets).all())))
    return found


@torch.no_grad()
def with_likeliest(family: str, requests: list[Score]) -> list[Score]:
    """The same, and for some the one token that the model holds likeliest."""
    model = reference_of(family)
    tokens = [int(model(torch.tensor([request.context]))[0, -1].argmax()) for request in requests[:9]]
    return requests + [Score(request.context, (token,)) for request, token in zip(requests, tokens, strict=False)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_as_the_plain_model_does(layout: str, checkpoints: dict[str, Path]) -> None:
    requests = {family: with_likeliest(family, score_requests()) for family in MODELS}
    results = run_on_ranks(layout_of(layout), answers_of(checkpoints, requests))
    for family, asked in requests.items():
        expected = plain_scores(family, asked)
        assert len({scored.is_greedy for scored in expected}) == 2
        for result in results:
            for scored, plain in zip(result[family], expected, strict=True):
                assert scored.logprobs == pytest.approx(plain.logprobs, rel=0, abs=1e-5)
                assert scored.is_greedy == plain.is_greedy
