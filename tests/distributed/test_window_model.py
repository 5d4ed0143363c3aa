"""The weights of a training engine answer in every layout that trains, against a plain model."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from answering_models import SEQ, VOCAB, checkpoint_of, config_of, reference_of
from plain_decoding import plain_greedy
from ranks import run_on_ranks
from trainer.checkpoint import sharded
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.engine.engine import Engine
from trainer.inference.answering import answer
from trainer.inference.requests import Answer, Decoding, Generate, Score
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


def plain_continuation(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    model = reference_of("GPT-2").double()

    @torch.no_grad()
    def next_logprobs(tokens: tuple[int, ...]) -> list[float]:
        logits: list[float] = model(torch.tensor([[*prompt, *tokens]]))[0, -1].tolist()
        return logits

    return plain_greedy(next_logprobs, (), num_tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_ranks_answer_as_the_plain_model_does(layout: str, tmp_path: Path) -> None:
    checkpoint, asked = checkpoint_of("GPT-2", tmp_path), requests()
    tree = config_of("GPT-2", LAYOUTS[layout]).model_dump(mode="json")
    config = from_tree(tree | {"train": tree["train"] | {"micro_batch_size": 2}})

    def rank(config: RunConfig, device: torch.device) -> list[Answer]:
        engine = Engine(config, device)
        sharded.load_initial_weights(engine, checkpoint)
        return answer(WindowModel(engine.stages, config, device), [*asked, *prompts])

    prompts = [Generate((1, 2, 3), 5), Generate((7,), 3), Generate((5, 6), 4, decoding=Decoding(beams=2))]
    expected = plain_logprobs(asked)
    for found in run_on_ranks(config, rank):
        for scored, logprobs in zip(found[: len(asked)], expected, strict=True):
            assert scored.logprobs == pytest.approx(logprobs, rel=0, abs=1e-5)
        greedy, short, searched = found[len(asked) :]
        assert greedy.tokens == plain_continuation((1, 2, 3), 5) and short.tokens == plain_continuation((7,), 3)
        assert len(searched.tokens) == 4


def test_replicas_that_hold_parts_of_the_weights_go_on_with_the_same_token() -> None:
    """Else one would end a text, by rounding, while another waits for its weights."""

    def rank(config: RunConfig, device: torch.device) -> int:
        model = WindowModel(Engine(config, device).stages, config, device)
        return int(model.share(torch.tensor([7 + dist.get_rank()])))

    assert run_on_ranks(config_of("GPT-2", LAYOUTS["DP2 ZeRO-3"]), rank) == [7, 7]
