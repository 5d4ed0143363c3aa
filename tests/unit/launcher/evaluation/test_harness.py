"""The lm-evaluation-harness through our adapter, against the harness's own model of the same folder."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch

from exported_models import SEQ, ExportedModel, exported_model
from harness_tasks import CHOICE, FREE, ROLLING, flat, write_tasks
from launcher.evaluation import harness
from launcher.evaluation.harness import BroadgaugeLM
from trainer.checkpoint.huggingface.answering import HuggingFaceModel, HuggingFaceTokenizer
from trainer.config import UserError
from trainer.inference.requests import Answer, Decoding, Generate, Generated, Request, Score, Scored

TASKS = [CHOICE, ROLLING, FREE]
PRECISIONS = {"float32": 1e-6, "float64": 1e-9}
"""To which a sum of log-probabilities is the same, relative to it: the harness sums in the precision it computes in."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    return exported_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(exported: ExportedModel) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(exported.folder)


def their_model(exported: ExportedModel, precision: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported.folder), device="cpu", dtype=precision, batch_size=4)


def our_model(exported: ExportedModel, tokenizer: HuggingFaceTokenizer, precision: str) -> BroadgaugeLM:
    model = HuggingFaceModel(exported.folder, getattr(torch, precision), target="cpu", max_batch_tokens=300)
    return BroadgaugeLM(model.answer, tokenizer, model.context_tokens)


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_document_is_answered_as_the_harness_own_model_does(
    precision: str, folder: Path, exported: ExportedModel, tokenizer: HuggingFaceTokenizer
) -> None:
    ours, theirs = (
        harness.evaluate(model, harness.load_tasks(TASKS, [folder]))
        for model in (our_model(exported, tokenizer, precision), their_model(exported, precision))
    )
    for task, num_documents in ((CHOICE, 20), (ROLLING, 4), (FREE, 7)):
        pairs = list(zip(ours["samples"][task], theirs["samples"][task], strict=True))
        assert len(pairs) == num_documents
        for one, other in pairs:
            assert one["arguments"] == other["arguments"]
            assert flat(one["resps"]) == [
                pytest.approx(value, rel=PRECISIONS[precision]) if isinstance(value, float) else value
                for value in flat(other["resps"])
            ]
    texts = flat([each["resps"] for each in ours["samples"][FREE]])
    assert len(set(texts)) > 3 and "" not in texts, "answers that hardly vary would show nothing"
    for one, other in zip(harness.reduced(ours), harness.reduced(theirs), strict=True):
        values = {name: getattr(other, name) for name in ("value", "stderr")}
        assert vars(one) == vars(other) | {
            name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            for name, value in values.items()
        }


@pytest.mark.slow
def test_examples_in_prompts_are_chosen_by_the_seed(
    folder: Path, exported: ExportedModel, tokenizer: HuggingFaceTokenizer
) -> None:
    def asked(seed: int) -> list[Request]:
        seen: list[Request] = []

        def answerer(requests: Sequence[Request]) -> list[Answer]:
            seen.extend(requests)
            return [Scored((-1.0,), False) for _ in requests]

        (first, *_) = harness.run_harness(
            answerer, tokenizer, 1000, [CHOICE], [folder], limit=3, num_fewshot=2, seed=seed
        )
        assert (first.num_documents, first.num_fewshot) == (3, 2)
        return seen

    first, again, other = map(asked, (1, 1, 2))
    assert first == again != other
    assert len(first) == 3 * 3 * 2, "each choice after its question, and after nothing"


def test_groups_have_results_of_their_own(folder: Path, tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    group = {"group": "both", "task": [CHOICE], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))

    def answerer(requests: Sequence[Request]) -> list[Answer]:
        return [Scored((float(-number),), False) for number, _ in enumerate(requests)]

    found = harness.run_harness(answerer, tokenizer, 1000, ["both"], [folder, tmp_path])
    assert {each.task for each in found} == {"both", CHOICE}
    by_task = {(each.task, each.metric): each for each in found}
    assert by_task["both", "acc"].value == by_task[CHOICE, "acc"].value == pytest.approx(7 / 20)
    assert by_task["both", "acc"].num_documents == 20 and by_task["both", "acc"].stderr is not None


# --------------------------------------------------------------------------------------------------- what a task asks


class Recorder:
    """Says the same to everything, and keeps what it was asked."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.asked: list[Request] = []
        self._answer = Generated(tuple(tokens))

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked += requests
        return [Scored((-1.0,), False) if isinstance(each, Score) else self._answer for each in requests]


def ask(tokenizer: HuggingFaceTokenizer, kind: str, *arguments: Any, said: str = "", **options: Any) -> Any:
    """What the model was asked, and what the harness is told."""
    recorder = Recorder(tokenizer.encode(said))
    model = BroadgaugeLM(recorder, tokenizer, SEQ, **options)
    (told,) = getattr(model, kind)([SimpleNamespace(args=arguments)])
    return recorder.asked, told


def generation(tokenizer: HuggingFaceTokenizer, **options: Any) -> Generate:
    ((request,), _) = ask(tokenizer, "generate_until", "the cat", {"max_gen_toks": 4, **options})
    return request


def test_what_is_too_long_loses_its_beginning(tokenizer: HuggingFaceTokenizer) -> None:
    long = "the cat sat on the mat, " * 9
    tokens = tokenizer.encode(long)
    ((score,), _) = ask(tokenizer, "loglikelihood", long, "so")
    whole = tokenizer.encode(long.rstrip() + " so")
    assert score.context + score.continuation == tuple(whole)[-SEQ - 1 :]
    ((request,), _) = ask(tokenizer, "generate_until", long, {"max_gen_toks": 5})
    assert request.prompt == tuple(tokens)[-(SEQ - 5) :] and request.max_new_tokens == 5


def test_a_text_after_nothing_follows_the_end_of_another(tokenizer: HuggingFaceTokenizer) -> None:
    end = tokenizer.end_of_text_id
    ((score,), _) = ask(tokenizer, "loglikelihood", "", "so")
    assert score == Score((end,), tuple(tokenizer.encode("so")))
    ((request,), _) = ask(tokenizer, "generate_until", "", {"max_gen_toks": 5})
    assert request.prompt == (end,)
    ((score,), _) = ask(tokenizer, "loglikelihood_rolling", "so", prefix_token_id=7)
    assert score.context == (7,)
    assert ask(tokenizer, "loglikelihood_rolling", "") == ([], 0.0)


def test_an_answer_ends_where_the_task_says(tokenizer: HuggingFaceTokenizer) -> None:
    def told(said: str, until: Any) -> str:
        _, text = ask(tokenizer, "generate_until", "Q", {"max_gen_toks": 9, "until": until}, said=said)
        return text

    assert told("the mat\n\nQ: so", ["\n", "Q:"]) == "the mat"
    assert told("the mat. Q: so\n", ["\n", "Q:"]) == "the mat. "
    assert told("the mat\nso", "\n") == "the mat"
    assert told("the mat\nso", []) == told("the mat\nso", None) == told("the mat\nso", [""]) == "the mat\nso"
    end = Recorder([*tokenizer.encode("mat"), tokenizer.end_of_text_id])
    (text,) = BroadgaugeLM(end, tokenizer, SEQ).generate_until([SimpleNamespace(args=("Q", {"max_gen_toks": 9}))])
    assert text == "mat"


def test_tokens_that_hold_a_stop_end_an_answer(tokenizer: HuggingFaceTokenizer) -> None:
    request = generation(tokenizer, until=["at", "\n\n"])
    texts = [tokenizer.decode([token]) for token in request.stop_ids]
    assert tokenizer.end_of_text_id in request.stop_ids
    assert {" cat", "at"} & set(texts) and all("at" in text or "endoftext" in text for text in texts)
    assert generation(tokenizer).stop_ids == (tokenizer.end_of_text_id,)


@pytest.mark.parametrize(
    ("options", "decoding"),
    [
        ({}, Decoding()),
        ({"do_sample": False, "temperature": 0.7}, Decoding()),
        ({"temperature": 0.7}, Decoding(temperature=0.7)),
        ({"do_sample": True}, Decoding(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 0}, Decoding(temperature=0.2, top_p=0.9)),
        ({"no_repeat_ngram_size": 3, "repetition_penalty": 1.2}, Decoding(repetition_penalty=1.2, no_repeat_ngram=3)),
        ({"num_beams": 1, "top_k": 5, "temperature": 1.0}, Decoding(temperature=1.0, top_k=5)),
    ],
)
def test_options_of_a_task_are_heeded(
    options: dict[str, Any], decoding: Decoding, tokenizer: HuggingFaceTokenizer
) -> None:
    assert generation(tokenizer, **options).decoding == decoding


def test_the_harness_other_names_for_the_number_of_tokens(tokenizer: HuggingFaceTokenizer) -> None:
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        ((request,), _) = ask(tokenizer, "generate_until", "the", {name: 6})
        assert request.max_new_tokens == 6


def test_what_cannot_be_done_is_refused(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(UserError, match=r"asks for num_beams 4 in its generation_kwargs"):
        generation(tokenizer, num_beams=4)
    with pytest.raises(UserError, match=rf"256 new tokens, and the model's context is {SEQ}.*max_gen_toks.* {SEQ - 1}"):
        ask(tokenizer, "generate_until", "the cat", {})
    with pytest.raises(UserError, match=rf"'aaa.* has .* to be scored, and the model's context is {SEQ}"):
        ask(tokenizer, "loglikelihood", "so", "a" * 100)


# ------------------------------------------------------------------------------------------- what cannot be had at all


@pytest.mark.slow  # all of the harness's own are read
def test_a_task_that_is_unknown_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no task hellaswg; did you mean .*hellaswag"):
        harness.load_tasks([CHOICE, "hellaswg"], [folder])


def test_a_folder_of_tasks_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="is no folder of tasks"):
        harness.load_tasks([CHOICE], [folder / "none"])


def test_data_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which both read when they are imported."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    task = {"task": "far", "dataset_path": "somebody/questions", "test_split": "test", "output_type": "multiple_choice"}
    (tmp_path / "far.yaml").write_text(json.dumps(task))
    with pytest.raises(
        UserError, match=r"task far cannot be loaded \(.*somebody/questions.*name a folder of tasks"
    ) as caught:
        harness.load_tasks(["far"], [tmp_path])
    assert "\n" not in str(caught.value)


WITHOUT = """
import sys
sys.modules["lm_eval"] = None
from trainer.config import UserError
try:
    import launcher.evaluation.harness
except UserError as error:
    print(error)
"""


def test_where_the_extra_is_missing_it_is_named() -> None:
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=root, capture_output=True, text=True, check=True)
    assert "pip install 'broadgauge[harness]'" in done.stdout and done.stdout.count("\n") == 1
