"""What an export answers, against the same class run plainly: one sequence at a time, and decoding in plain Python."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data_pipeline.tokenization import Tokenizer
from exported_models import SEQ, VARIANTS, VOCAB, exported_model
from plain_decoding import (
    log_softmax,
    plain_beams,
    plain_greedy,
    with_repetition_penalty,
    without_repeated_ngrams,
)
from trainer.checkpoint.huggingface.answering import HuggingFaceModel, HuggingFaceTokenizer
from trainer.config import UserError
from trainer.inference.requests import Decoding, Generate, Generated, Request, Score, Scored, Tokens

DRAW = random.Random(1)


def some_tokens(length: int) -> Tokens:
    return tuple(DRAW.randrange(VOCAB) for _ in range(length))


LENGTHS = [(1, 1), (5, 3), (SEQ, 1), (1, SEQ), (20, 9), (7, 3), (7, 1)]
SCORES = [Score(some_tokens(context), some_tokens(continuation)) for context, continuation in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {name: exported_model(root / name, **changes).folder for name, changes in VARIANTS.items()}


class Plain:
    """The class of transformers, in double precision: what is left is the rounding of the one that is tested."""

    def __init__(self, folder: Path) -> None:
        self._seen: dict[Tokens, list[list[float]]] = {}
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> list[list[float]]:
        if tokens not in self._seen:
            self._seen[tokens] = self._model(torch.tensor([tokens])).logits[0].tolist()
        return self._seen[tokens]

    def logprobs(self, request: Score) -> list[float]:
        rows = self.logits((request.context + request.continuation)[:-1])[len(request.context) - 1 :]
        return [log_softmax(row)[token] for row, token in zip(rows, request.continuation, strict=True)]

    def next_logprobs(self, request: Generate) -> Callable[[Tokens], list[float]]:
        """As `request.decoding` wants them."""

        def after(continuation: Tokens) -> list[float]:
            seen, decoding = request.prompt + continuation, request.decoding
            logits = self.logits(seen)[-1]
            logprobs = log_softmax(with_repetition_penalty(logits, seen, decoding.repetition_penalty))
            return (
                without_repeated_ngrams(logprobs, seen, decoding.no_repeat_ngram)
                if decoding.no_repeat_ngram
                else logprobs
            )

        return after


@functools.cache
def plain_model(folder: Path) -> Plain:
    return Plain(folder)


def answers(folder: Path, requests: list[Any], **options: Any) -> list[Any]:
    return HuggingFaceModel(folder, target="cpu", **options).answer(requests)


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_a_plain_forward(variant: str, folders: dict[str, Path]) -> None:
    plain = plain_model(folders[variant])
    for request, answer in zip(SCORES, answers(folders[variant], SCORES), strict=True):
        assert answer.logprobs == pytest.approx(plain.logprobs(request), rel=1e-6, abs=1e-6)
    for request, answer in zip(SCORES, answers(folders[variant], SCORES, dtype=torch.float64), strict=True):
        # not to 1e-12: GPT-Neo computes attention, and Llama its norms, in fp32 whatever it is asked for
        assert answer.logprobs == pytest.approx(plain.logprobs(request), rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_do_not_matter(variant: str, folders: dict[str, Path]) -> None:
    alone = answers(folders[variant], SCORES, max_batch_tokens=1)
    for max_batch_tokens in (50, 10**6):
        together = answers(folders[variant], SCORES[::-1], max_batch_tokens=max_batch_tokens)[::-1]
        for one, other in zip(alone, together, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
            assert one.is_greedy == other.is_greedy


def test_what_the_model_would_say_is_greedy_and_nothing_else(folders: dict[str, Path]) -> None:
    prompt = some_tokens(6)
    (said,) = answers(folders["GPT-2"], [Generate(prompt, 5)])
    almost = (*said.tokens[:-1], (said.tokens[-1] + 1) % VOCAB)
    early = ((said.tokens[0] + 1) % VOCAB, *said.tokens[1:])
    asked = [Score(prompt, said.tokens), Score(prompt, almost), Score(prompt, early)]
    assert [each.is_greedy for each in answers(folders["GPT-2"], asked)] == [True, False, False]


def test_memory_is_bounded_by_tokens_at_once(folders: dict[str, Path]) -> None:
    model = HuggingFaceModel(folders["GPT-2"], target="cpu", max_batch_tokens=100)
    seen: list[int] = []
    model._model.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    requests = [Score(some_tokens(DRAW.randrange(1, 30)), some_tokens(2)) for _ in range(40)]
    model.answer(requests)
    assert max(seen) <= 100 and len(seen) < 20


# ---------------------------------------------------------------------------------------------------------- generating

PROMPTS = [some_tokens(length) for length in (4, 9, 4, 1, 9, 12)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "decoding",
    [Decoding(), Decoding(repetition_penalty=1.7), Decoding(no_repeat_ngram=1), Decoding(no_repeat_ngram=2)],
    ids=["likeliest", "penalty", "no token twice", "no pair twice"],
)
def test_greedy_is_what_plain_decoding_says(variant: str, decoding: Decoding, folders: dict[str, Path]) -> None:
    plain = plain_model(folders[variant])
    requests = [Generate(prompt, 8, stop_ids, decoding) for prompt in PROMPTS for stop_ids in ((), tuple(range(150)))]
    found = answers(folders[variant], requests)
    assert found == [
        Generated(plain_greedy(plain.next_logprobs(each), each.stop_ids, each.max_new_tokens)) for each in requests
    ]
    lengths = [len(each.tokens) for each in found]
    assert min(lengths) < max(lengths) == 8, "some end early, and some do not"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_batch_tokens", [1, 10**6])
def test_beams_are_those_of_the_plain_search(variant: str, max_batch_tokens: int, folders: dict[str, Path]) -> None:
    plain = plain_model(folders[variant])
    requests = [
        Generate(PROMPTS[0], 4, (), Decoding(beams=3)),
        Generate(PROMPTS[1], 5, tuple(range(60)), Decoding(beams=4)),
        Generate(
            PROMPTS[2],
            4,
            tuple(range(60)),
            Decoding(beams=2, length_penalty=2.0, no_repeat_ngram=1, repetition_penalty=1.3),
        ),
    ]
    assert answers(folders[variant], requests, max_batch_tokens=max_batch_tokens) == [
        Generated(plain_beams(plain.next_logprobs(each), each.decoding, each.stop_ids, each.max_new_tokens))
        for each in requests
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_length_penalty_beams_are_those_of_transformers(variant: str, folders: dict[str, Path]) -> None:
    """Which divides by another; with none, nothing else differs."""
    model = HuggingFaceModel(folders[variant], target="cpu")
    stop_ids = tuple(range(0, VOCAB, 9))
    ways = [Decoding(beams=beams, length_penalty=0.0) for beams in (2, 4)]
    requests = [Generate(prompt, 9, stop_ids, way) for prompt in PROMPTS for way in ways]
    found = model.answer(requests)
    for request, answer in zip(requests, found, strict=True):
        tokens = torch.tensor([request.prompt])
        whole = model._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=9,
            num_beams=request.decoding.beams,
            length_penalty=0.0,
            early_stopping="never",
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
        )
        assert answer.tokens == tuple(whole[0, len(request.prompt) :].tolist())
    assert len({len(answer.tokens) for answer in found}) > 1


def test_the_end_of_text_ends_only_what_asks_for_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """Though config.json and generation_config.json say that it ends every text."""
    model = HuggingFaceModel(folders["GPT-2"], target="cpu")
    (said,) = model.answer([Generate(PROMPTS[0], 6)])
    model._model.config.eos_token_id = said.tokens[1]
    model._model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said.tokens[1], "max_length": 7}))
    through, ended = answers(tmp_path, [Generate(PROMPTS[0], 6), Generate(PROMPTS[0], 6, (said.tokens[1],))])
    assert through == said
    assert ended.tokens == said.tokens[: said.tokens.index(said.tokens[1]) + 1]


DRAWN = [Generate(prompt, 6, (), Decoding(temperature=1.5, seed=3)) for prompt in PROMPTS]


def test_each_request_draws_from_a_stream_of_its_own(folders: dict[str, Path]) -> None:
    model = HuggingFaceModel(folders["GPT-2"], target="cpu")
    random_state = torch.get_rng_state()
    found = model.answer(DRAWN)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.answer([*SCORES[:1], *DRAWN[1:]])[1:] == found[1:], "others do not matter"
    assert model.answer([DRAWN[0]] * 4)[0] == found[0]
    assert len(set(model.answer([DRAWN[0]] * 4))) > 1, "its number does"
    other = Generate(DRAWN[0].prompt, 6, (), Decoding(temperature=1.5, seed=4))
    assert model.answer([other])[0] != found[0], "and so does the seed"


def test_only_so_many_of_the_likeliest_are_drawn(folders: dict[str, Path]) -> None:
    model = HuggingFaceModel(folders["GPT-2"], target="cpu")
    prompt = PROMPTS[1]
    logprobs = plain_model(folders["GPT-2"]).next_logprobs(Generate(prompt, 1))(())
    ranked = sorted(range(VOCAB), key=lambda token: -logprobs[token])

    def drawn(count: int, **options: Any) -> set[int]:
        decoding = Decoding(temperature=10.0, **options)
        return {each.tokens[0] for each in model.answer([Generate(prompt, 1, (), decoding)] * count)}

    assert drawn(60, top_k=3) == set(ranked[:3])
    assert drawn(20, top_p=1e-6) == {ranked[0]}
    assert len(drawn(120)) > 60, "without a limit, and transformers' own is 50"


def test_an_answer_to_each_in_their_order(folders: dict[str, Path]) -> None:
    requests: list[Request] = [DRAWN[0], SCORES[1], Generate(PROMPTS[0], 0), Generate(PROMPTS[1], 3), SCORES[0]]
    found = answers(folders["GPT-2"], requests)
    assert [type(each) for each in found] == [Generated, Scored, Generated, Generated, Scored]
    assert [len(each.logprobs) for each in found if isinstance(each, Scored)] == [3, 1]
    assert found[2].tokens == () and len(found[3].tokens) == 3
    assert answers(folders["GPT-2"], []) == []


# ------------------------------------------------------------------------------------------------ refusals, tokenizers


@pytest.mark.parametrize(
    "request_",
    [Score((1,) * SEQ, (1, 2)), Score((), (1,)), Score((1,), ()), Generate((1,) * SEQ, 1), Generate((), 1)],
    ids=["long score", "no context", "nothing to score", "long prompt", "no prompt"],
)
def test_what_does_not_fit_is_refused(request_: Request, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=rf"request 1 has .* reads 1 to {SEQ}"):
        answers(folders["GPT-2"], [SCORES[0], request_])


def test_a_folder_without_a_whole_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no exported model"):
        HuggingFaceModel(tmp_path)
    config = json.loads((folders["GPT-2"] / "config.json").read_text())
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    with pytest.raises(UserError, match=r"does not fit its config\.json: transformer.h.4") as caught:
        HuggingFaceModel(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_is_plain_text(folders: dict[str, Path]) -> None:
    theirs, ours = HuggingFaceTokenizer(folders["GPT-2"]), Tokenizer.load(folders["GPT-2"], engine="reference")
    assert (theirs.end_of_text_id, theirs.vocab_size) == (ours.end_of_text_id, ours.vocab_size)
    for text in ("the cat sat .", "", " \n\nQ: naïve 猫?", "a<|endoftext|>b", "x" * 1000):
        tokens = theirs.encode(text)
        assert tokens == ours.encode_batch([text]).ids.tolist()
        assert theirs.decode(tokens) == ours.decode(tokens) == text
        assert theirs.end_of_text_id not in tokens


def test_a_folder_without_a_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open the tokenizer"):
        HuggingFaceTokenizer(tmp_path / "none")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folders["GPT-2"] / name).read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(UserError, match="no token that ends a text"):
        HuggingFaceTokenizer(tmp_path)
