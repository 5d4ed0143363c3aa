"""Scores and continuations in every layout for inference, against a plain model that keeps nothing in a cache."""

import itertools
import json
import math
import multiprocessing
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from answering_models import MODELS, SEQ, VOCAB, checkpoint_of, config_of, reference_of
from ranks import run_on_ranks
from reference_gpt import ReferenceGPT
from trainer.checkpoint.huggingface import export
from trainer.config import RunConfig
from trainer.config_file import dump
from trainer.inference.answering import answer
from trainer.inference.cached import CachedModel
from trainer.inference.decoding import stream
from trainer.inference.layout import inference_config
from trainer.inference.requests import (
    Answer,
    Decoding,
    Generate,
    Generated,
    Request,
    Score,
    Scored,
    Tokens,
    read_answers,
    write_requests,
)
from trainer.rank import main
from trainer.rank_spec import RankSpec

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


def of_some(*names: str, all_of: Iterable[str] = LAYOUTS) -> list[Any]:
    """Layouts as parameters, of which only these are tested where it must be quick."""
    return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in all_of]


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


def test_bf16_scores_close_to_fp32(checkpoints: dict[str, Path]) -> None:
    requests = score_requests()

    def rank(config: RunConfig, device: torch.device) -> Any:
        return {
            precision: answer(CachedModel(config_of("Llama", None, precision), checkpoints["Llama"], device), requests)
            for precision in ("fp32", "bf16")
        }

    (found,) = run_on_ranks(layout_of("one rank"), rank)
    means = {precision: fmean(itertools.chain(*(each.logprobs for each in found[precision]))) for precision in found}
    assert means["bf16"] == pytest.approx(means["fp32"], rel=0.02) and means["bf16"] != means["fp32"]


# --------------------------------------------------------------------------------------------------------- generation

SAMPLED = Decoding(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram=2, seed=3)
STOP = 7


def generate_requests() -> list[Request]:
    """Prompts of many lengths, to be continued in several ways; some continuations end at a stop token."""
    draw = random.Random(8)

    def one(number: int) -> Generate:
        length = draw.choice([1, 3, 7, 7, 12, 20])
        prompt = tuple(draw.randrange(VOCAB) for _ in range(length))
        stops = tuple(draw.sample(range(VOCAB), number % 4 * 8))
        return Generate(prompt, draw.randint(1, SEQ - length), stops, Decoding() if number % 2 else SAMPLED)

    return [one(number) for number in range(24)]


@torch.no_grad()
def plain_continuation(model: ReferenceGPT, number: int, request: Generate) -> Tokens:
    """The whole text read anew for each token, and each token drawn from a list of probabilities."""
    text, draw, decoding = list(request.prompt), stream(request.decoding.seed, number), request.decoding
    for _ in range(request.max_new_tokens):
        logits = model(torch.tensor([text]))[0, -1].double().tolist()
        logits = [
            (x / decoding.repetition_penalty if x > 0 else x * decoding.repetition_penalty) if token in text else x
            for token, x in enumerate(logits)
        ]
        pairs = set(itertools.pairwise(text)) if decoding.no_repeat_ngram else set()
        logits = [-math.inf if (text[-1], token) in pairs else x for token, x in enumerate(logits)]
        if decoding.temperature == 0:
            text.append(max(range(VOCAB), key=lambda token: logits[token]))
        else:
            ranked = sorted(range(VOCAB), key=lambda token: -logits[token])[: decoding.top_k]
            weights = {token: math.exp(logits[token] / decoding.temperature) for token in ranked}
            kept, total = [], sum(weights.values())
            for token in ranked:
                kept.append(token)
                if sum(weights[token] for token in kept) / total >= decoding.top_p:
                    break
            at = draw.random() * sum(weights[token] for token in kept)
            for token in sorted(kept):
                at -= weights[token]
                if at < 0:
                    break
            text.append(token)
        if text[-1] in request.stop_ids:
            break
    return tuple(text[len(request.prompt) :])


@pytest.fixture(scope="module")
def plain_continuations() -> dict[str, list[Answer]]:
    found = {}
    for family in MODELS:
        model = reference_of(family)
        numbered = enumerate(generate_requests())
        found[family] = [Generated(plain_continuation(model, number, request)) for number, request in numbered]
    return found


@pytest.mark.parametrize("layout", of_some("one rank", "TP2 x PP2", "TP2 SP x CP2 ZeRO-3"))
def test_every_layout_goes_on_as_the_plain_model_does(
    layout: str, checkpoints: dict[str, Path], plain_continuations: dict[str, list[Answer]]
) -> None:
    results = run_on_ranks(
        layout_of(layout), answers_of(checkpoints, {family: generate_requests() for family in MODELS})
    )
    for result in results:
        assert result == plain_continuations


@pytest.fixture(scope="module")
def exports(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "word": 1}, unk_token="word")).save(str(root / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    folders = {}
    for family in ("GPT-2", "Llama"):
        config, folders[family] = config_of(family), root / family
        export.commit(export.export_model(checkpoints[family], config, root, folders[family], {}), folders[family])
    return folders


def by_transformers(folder: Path, requests: list[Generate]) -> list[Answer]:
    """One prompt at a time; of beams, the sum of log-probabilities decides."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[Answer] = []
    for request in requests:
        decoding, prompt = request.decoding, torch.tensor([request.prompt])
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(request.stop_ids) or None,
            pad_token_id=0,
            repetition_penalty=decoding.repetition_penalty,
            no_repeat_ngram_size=decoding.no_repeat_ngram,
            num_beams=decoding.beams,
            early_stopping="never" if decoding.beams > 1 else None,
            length_penalty=decoding.length_penalty,
        )
        found.append(Generated(tuple(whole[0, len(request.prompt) :].tolist())))
    return found


@pytest.mark.parametrize("layout", of_some("one rank", "TP2 x PP2", all_of=("one rank", "TP2", "PP2", "TP2 x PP2")))
def test_the_likeliest_tokens_are_those_of_transformers(
    layout: str, checkpoints: dict[str, Path], exports: dict[str, Path]
) -> None:
    draw = random.Random(9)
    prompts = [tuple(draw.randrange(VOCAB) for _ in range(length)) for length in (1, 4, 4, 11, 20)]
    stops = (draw.randrange(VOCAB), draw.randrange(VOCAB))
    ways = [Decoding(), Decoding(repetition_penalty=1.3, no_repeat_ngram=3), Decoding(beams=3, length_penalty=0.0)]
    asked = [Generate(prompt, 12, stops, way) for prompt in prompts for way in ways]
    results = run_on_ranks(layout_of(layout), answers_of(checkpoints, dict.fromkeys(exports, asked)))
    for family, folder in exports.items():
        expected = by_transformers(folder, asked)
        for result in results:
            assert result[family] == expected


def test_whoever_listens_hears_every_token_of_one_beam(checkpoints: dict[str, Path]) -> None:
    """Of two replicas and two stages: in order within a request, and those of scores and beams not at all."""
    beams = Generate((1, 2), 4, (), Decoding(beams=2))
    asked: list[Request] = [*generate_requests()[:7], Score((1,), (2, 3)), beams]

    def rank(config: RunConfig, device: torch.device) -> Any:
        heard = dict[int, list[int]]()
        model = CachedModel(config, checkpoints["GPT-2"], device)
        answers = answer(model, asked, lambda number, token: heard.setdefault(number, []).append(token))
        return answers, heard

    for answers, heard in run_on_ranks(inference_config(config_of("GPT-2", {"data": 2, "pipeline": 2})), rank):
        generated = {number: list(each.tokens) for number, each in enumerate(answers) if isinstance(each, Generated)}
        assert len(generated.pop(8)) == 4
        assert heard == generated and len(heard) == 7


def test_the_task_of_ranks_answers_from_file_to_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In whatever layout they would train, and with every token in the stream."""
    config = config_of("GPT-Neo", {"tensor": 2, "sequence": True, "context": 2})
    requests = [*generate_requests()[:6], *score_requests()[:5]]
    write_requests(tmp_path / "requests", requests)
    spec = RankSpec(
        rank=0,
        world_size=4,
        local_rank=0,
        local_world_size=4,
        rendezvous=f"file://{tmp_path}/rendezvous",
        config_yaml=dump(config),
        run_dir=tmp_path,
        task="answer",
        checkpoint=checkpoints["GPT-Neo"],
        output=tmp_path / "answers",
        requests=tmp_path / "requests",
        stream=tmp_path / "stream",
    )
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=main, args=(replace(spec, rank=rank, local_rank=rank),)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0] * 4
    answers = read_answers(tmp_path / "answers", requests)
    (expected,) = run_on_ranks(layout_of("one rank"), answers_of(checkpoints, {"GPT-Neo": requests}))
    streamed = dict[int, list[int]]()
    for line in (tmp_path / "stream").read_text().splitlines():
        number, token = map(int, line.split())
        streamed.setdefault(number, []).append(token)
    assert answers[:6] == expected["GPT-Neo"][:6]
    assert streamed == {number: list(answer.tokens) for number, answer in enumerate(expected["GPT-Neo"][:6])}
    for scored, same in zip(answers[6:], expected["GPT-Neo"][6:], strict=True):
        assert isinstance(scored, Scored) and scored.logprobs == pytest.approx(same.logprobs, abs=1e-5)
