"""The weights of a training engine answer in every layout that trains, against a plain model."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from answering_models import SEQ, VOCAB, checkpoint_of, config_of, reference_of
from ranks import run_on_ranks
from trainer.checkpoint import sharded
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.engine.engine import Engine
from trainer.inference.answering import answer
from trainer.inference.requests import Answer, Score
from trainer.inference.windows import WindowModel

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP x CP2": {"tensor": 2, "sequence": True, "context": 2},
    "PP2 interleaved x DP2": {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
}


def requests() -> list[Score]:
    draw = random.Random(8)
    lengths = [(1, 1), (1, SEQ), (SEQ, 1), *((n := draw.randint(1, 20), draw.randint(1, SEQ - n)) for _ in range(8))]
    return [Score(*(tuple(draw.randrange(VOCAB) for _ in range(number)) for number in pair)) for pair in lengths]


@torch.no_grad()
def plain_logprobs(asked: list[Score]) -> list[list[float]]:
    model, found = reference_of("GPT-2").double(), []
    for each in asked:
        whole = torch.tensor([*each.context, *each.continuation])
        logprobs = model(whole[None, :-1])[0].log_softmax(-1)[len(each.context) - 1 :]
        found.append(logprobs.gather(1, whole[len(each.context) :, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_ranks_score_as_the_plain_model_does(layout: str, tmp_path: Path) -> None:
    checkpoint, asked = checkpoint_of("GPT-2", tmp_path), requests()
    tree = config_of("GPT-2", LAYOUTS[layout]).model_dump(mode="json")
    config = from_tree(tree | {"train": tree["train"] | {"micro_batch_size": 2}})

    def rank(config: RunConfig, device: torch.device) -> list[Answer]:
        engine = Engine(config, device)
        sharded.load_initial_weights(engine, checkpoint)
        return answer(WindowModel(engine.stages, config, device), asked)

    for found in run_on_ranks(config, rank):
        for scored, expected in zip(found, plain_logprobs(asked), strict=True):
            assert scored.logprobs == pytest.approx(expected, rel=0, abs=1e-5)
