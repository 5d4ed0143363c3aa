"""Ranks with a checkpoint against its export: by the harness's own model, and by what transformers answers."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from exported_models import SEQ, VOCAB, ExportedModel, exported_model
from harness_tasks import CHOICE, FREE, ROLLING, flat, write_tasks
from launcher.evaluation import harness
from ranks import run_on_ranks
from trainer.checkpoint.huggingface.answering import HuggingFaceModel, HuggingFaceTokenizer
from trainer.config import RunConfig
from trainer.inference.answering import answer
from trainer.inference.cached import CachedModel
from trainer.inference.layout import inference_config
from trainer.inference.requests import Answer, Decoding, Generate, Request, Score, Scored
from trainer.rules import changed

TASKS = [CHOICE, ROLLING, FREE]
LAYOUTS: dict[str, dict[str, Any]] = {"one rank": {}, "TP2 x PP2": {"parallel.tensor": 2, "parallel.pipeline": 2}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return exported_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def theirs(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(exported.folder), device="cpu", dtype="float32", batch_size=4)
    return harness.evaluate(model, harness.load_tasks(TASKS, [folder]))


def answers_of_ranks(exported: ExportedModel, layout: str, requests: Sequence[Request]) -> list[Answer]:
    def rank(config: RunConfig, device: torch.device) -> list[Answer]:
        return answer(CachedModel(config, exported.checkpoint, device), requests)

    (answers, *_) = run_on_ranks(inference_config(changed(exported.config, LAYOUTS[layout])), rank)
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_answer_every_document_as_the_harness_own_model_does(
    layout: str, exported: ExportedModel, folder: Path, theirs: dict[str, Any]
) -> None:
    tokenizer = HuggingFaceTokenizer(exported.folder)
    model = harness.BroadgaugeLM(
        lambda requests: answers_of_ranks(exported, layout, requests), tokenizer, exported.config.model.seq_length
    )
    ours = harness.evaluate(model, harness.load_tasks(TASKS, [folder]))
    for task, num_documents in ((CHOICE, 20), (ROLLING, 4), (FREE, 7)):
        pairs = list(zip(ours["samples"][task], theirs["samples"][task], strict=True))
        assert len(pairs) == num_documents
        for one, other in pairs:
            assert flat(one["resps"]) == [
                pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for value in flat(other["resps"])
            ]


WAYS = [
    Decoding(),
    Decoding(repetition_penalty=1.3, no_repeat_ngram=2),
    Decoding(temperature=1.2, seed=7),
    Decoding(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=8),
    Decoding(beams=4),  # as GPT-3's free-form tasks are answered
    Decoding(beams=3, length_penalty=2.0, repetition_penalty=1.3, no_repeat_ngram=2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_and_its_export_answer_the_same(layout: str, exported: ExportedModel) -> None:
    draw = random.Random(4)

    def some(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(length))

    requests: list[Request] = [Generate(some(n), 12, some(20), way) for n in (1, 5, 5, SEQ - 12) for way in WAYS]
    requests += [Score(some(n), some(m)) for n, m in ((1, SEQ), (SEQ, 1), (9, 4))]
    found = answers_of_ranks(exported, layout, requests)
    by_transformers = HuggingFaceModel(exported.folder, target="cpu").answer(requests)
    for answer_of_rank, expected in zip(found, by_transformers, strict=True):
        if isinstance(answer_of_rank, Scored) and isinstance(expected, Scored):
            assert answer_of_rank.logprobs == pytest.approx(expected.logprobs, abs=2e-6)
            assert answer_of_rank.is_greedy == expected.is_greedy
        else:
            assert answer_of_rank == expected
