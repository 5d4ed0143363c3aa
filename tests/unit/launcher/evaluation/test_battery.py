"""From tasks to requests, and from answers to results, with answerers that are known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.tokenization import train_bpe
from launcher.evaluation.battery import Battery
from launcher.evaluation.contamination import TaskOverlap
from launcher.evaluation.finding import LoadedTask, load_tasks
from launcher.evaluation.grading import NOT_FINITE
from launcher.evaluation.intervals import wilson
from launcher.evaluation.prompts import NO_TOKENS, TOO_LONG
from launcher.evaluation.tokens import FolderTokenizer, check_tokenizer
from made_tasks import RECORDS, write_task
from trainer.config import UserError
from trainer.inference.requests import (
    Answer,
    Generate,
    Generated,
    Request,
    Score,
    Scored,
    read_requests,
    write_requests,
)

SHIPPED = ("arithmetic_2d_plus", "korean_particles", "larger_number", "induction", "scrambled_reversed")


def few(names: Sequence[str], most: int = 12) -> list[LoadedTask]:
    """Shipped tasks with their first records only."""
    return [replace(loaded, test=loaded.test[:most]) for loaded in load_tasks(names)]


def oracle(battery: Battery, *, is_right: bool) -> list[Answer]:
    """Knows the records: says what is right, or what is wrong, of each."""
    answers: dict[int, Answer] = {}
    for loaded, cases in zip(battery.tasks, battery.cases, strict=True):
        for case in cases:
            example = loaded.test[case.number]
            for place, at in enumerate(case.asked):
                request = battery.requests[at]
                if isinstance(request, Generate):
                    tokens = battery.tokenizer.encode(f"{example.answers[0] if is_right else ' nothing'}\nQ: more")
                    answers[at] = Generated(tuple(tokens[: request.max_new_tokens]))
                else:
                    is_likely = (place == example.right) == is_right
                    answers[at] = Scored((-0.5 if is_likely else -5.0,) * len(request.continuation), is_likely)
            for at in case.generic:
                request = battery.requests[at]
                assert isinstance(request, Score)
                answers[at] = Scored((-2.0,) * len(request.continuation), False)
    return [answers[at] for at in range(len(battery.requests))]


@pytest.mark.parametrize(("is_right", "value"), [(True, 1.0), (False, 0.0)])
def test_whoever_knows_all_gets_all_and_whoever_errs_nothing(tokenizer, is_right: bool, value: float) -> None:
    battery = Battery.of(few(SHIPPED), tokenizer, 512)
    results = battery.grade(oracle(battery, is_right=is_right))
    assert [(each.task, each.shots) for each in results] == [
        (loaded.task.name, shots) for loaded in battery.tasks for shots in loaded.task.shots
    ]
    for result in results:
        name = result.task
        metric = "exact_match" if "exact_match" in result.metrics else "accuracy"
        assert result.metrics[metric] == wilson(round(12 * value), 12), name
        assert (result.num_examples, result.skipped, result.num_truncated) == (12, {}, 0)
        assert result.min_demonstrations == result.mean_demonstrations == result.shots
        assert result.chance == (0.5 if name in ("korean_particles", "larger_number") else None)
        if "answer_logprob" in result.metrics:
            assert result.metrics["answer_logprob"].value == (-0.5 if is_right else -5.0)


def by_longest_match(request: Request) -> Answer:
    """A model that goes on as the text did after the longest suffix of the context that it has had before."""
    assert isinstance(request, Score)

    def says(tokens: tuple[int, ...]) -> int | None:
        for length in range(min(20, len(tokens) - 1), 0, -1):
            for at in range(len(tokens) - length - 1, -1, -1):
                if tokens[at : at + length] == tokens[-length:]:
                    return tokens[at + length]
        return None

    said = [says(request.context + request.continuation[:at]) for at in range(len(request.continuation))]
    is_said = [one == token for one, token in zip(said, request.continuation, strict=True)]
    return Scored(tuple(-0.1 if each else -9.0 for each in is_said), all(is_said))


def test_a_model_that_copies_goes_on_with_a_sequence_that_has_begun_again(tokenizer) -> None:
    battery = Battery.of(load_tasks(["induction"]), tokenizer, 128)
    (result,) = battery.grade([by_longest_match(request) for request in battery.requests])
    assert result.num_examples == 200 and result.metrics["accuracy"].value > 0.95


def test_requests_fit_the_model_and_ask_nothing_twice(tokenizer, tmp_path: Path) -> None:
    battery = Battery.of(few([*SHIPPED, "copying"], 40), tokenizer, 96)
    assert len(set(battery.requests)) == len(battery.requests)
    for request in battery.requests:
        if isinstance(request, Score):
            assert request.context and request.continuation
            assert len(request.context) + len(request.continuation) <= 97
        else:
            assert request.prompt and len(request.prompt) + request.max_new_tokens <= 96
            assert tokenizer.end_of_text_id in request.stop_ids and request.decoding.beams == 4
    write_requests(tmp_path / "requests", battery.requests)
    assert tuple(read_requests(tmp_path / "requests")) == battery.requests


def test_demonstrations_that_were_left_out_are_told(tokenizer) -> None:
    battery = Battery.of(few(["arithmetic_2d_plus"]), tokenizer, 96)
    results = battery.grade(oracle(battery, is_right=True))
    assert [each.shots for each in results] == [0, 1, 8]
    assert results[1].mean_demonstrations == 1 and 1 <= results[2].min_demonstrations < 8
    assert results[2].min_demonstrations <= results[2].mean_demonstrations < 8


def test_prompts_cut_at_the_left_and_skipped_answers_are_counted(tokenizer, tmp_path: Path) -> None:
    records = [
        {"question": "the dog " * 30, "answer": "fox"},
        {"question": "the dog", "answer": "zxz" * 30},
        {"question": "the dog", "answer": ""},
        {"question": "the dog", "answer": "fox"},
        {"question": "the quick dog", "answer": "fox"},
    ]
    path = write_task(tmp_path, records, kind="cloze", prompt="{question}", answer="{answer}")
    battery = Battery.of(load_tasks([str(path)]), tokenizer, 24)
    assert len(battery.requests) == 3
    answers = [Scored((-1.0,) * len(request.continuation), True) for request in battery.requests]
    broken = Scored((float("nan"),) * len(answers[-1].logprobs), False)
    (result,) = battery.grade([*answers[:-1], broken])
    assert result.skipped == {NO_TOKENS: 1, TOO_LONG: 1, NOT_FINITE: 1}
    assert (result.num_examples, result.num_truncated) == (2, 1)
    reasons = [grade.skipped for _, _, grade in battery.grades([*answers[:-1], broken])]
    assert reasons == [None, TOO_LONG, NO_TOKENS, None, NOT_FINITE]


def test_choices_share_their_demonstrations(tokenizer, tmp_path: Path) -> None:
    """The long choice decides for both."""
    records = [{"question": "the", "options": ["dog", "quick brown fox " * 6], "label": 0}]
    train = [{"question": f"the {n}", "options": ["dog", "fox"], "label": 1} for n in range(6)]
    fields = {"kind": "multiple_choice", "prompt": "{question}", "choices": "options", "shots": [6]}
    battery = Battery.of(load_tasks([str(write_task(tmp_path, records, train, **fields))]), tokenizer, 50)
    contexts = {request.context for request in battery.requests}
    (case,) = battery.cases[0]
    assert len(contexts) == 1 and 0 < case.num_demonstrations < 6


def test_the_same_tasks_are_the_same_requests_wherever_they_lie(tokenizer, tmp_path: Path) -> None:
    def battery_in(folder: str, seed: int = 0, context: int = 128, **fields: object) -> Battery:
        (tmp_path / folder).mkdir(exist_ok=True)
        path = write_task(tmp_path / folder, RECORDS, [{"question": "a", "answer": "b"}], shots=[1], **fields)
        return Battery.of(load_tasks([str(path)]), tokenizer, context, seed)

    one = battery_in("a")
    assert battery_in("b").requests == one.requests
    assert battery_in("b").fingerprint == one.fingerprint == battery_in("b", about="Other words.").fingerprint
    others = [
        battery_in("c", seed=1),
        battery_in("c", context=127),
        battery_in("c", stop="."),
        battery_in("c", metrics=["f1"]),
        battery_in("c", answer="{answer}"),
    ]
    assert len({each.fingerprint for each in (one, *others)}) == 6


def test_an_export_is_asked_what_its_checkpoint_is_asked(tokenizer, tmp_path: Path) -> None:
    """The tokenizer is the same wherever it is read from."""
    from transformers import AutoTokenizer

    train_bpe(["the quick brown fox"] * 8, 270, tmp_path / "a", 64)
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    batteries = [Battery.of(few(SHIPPED), FolderTokenizer.load(tmp_path / name), 256) for name in ("a", "b")]
    assert batteries[0].requests == batteries[1].requests


def test_answers_of_more_tokens_than_the_context_are_refused(tokenizer, tmp_path: Path) -> None:
    tasks = load_tasks([str(write_task(tmp_path, max_new_tokens=64))])
    with pytest.raises(UserError, match=r"max_new_tokens 64 of the task made leaves no room .* set it to 63 at most"):
        Battery.of(tasks, tokenizer, 64)
    assert Battery.of(tasks, tokenizer, 65).requests


def test_answers_to_other_requests_are_no_results(tokenizer) -> None:
    battery = Battery.of(few(["induction"]), tokenizer, 64)
    with pytest.raises(ValueError, match="11 answers to 12 requests"):
        battery.grade(oracle(battery, is_right=True)[1:])


def test_scores_of_clean_and_dirty_records(tokenizer, tmp_path: Path) -> None:
    battery = Battery.of(load_tasks([str(write_task(tmp_path, answer="{answer}"))]), tokenizer, 128)
    right, wrong = oracle(battery, is_right=True), oracle(battery, is_right=False)
    answers = [*right[:2], *wrong[2:4], right[4], wrong[5]]
    overlap = TaskOverlap(9, (True, True, False, False, None, False))
    (result,) = battery.grade(answers, {"made": overlap})
    seen = result.contamination
    assert seen is not None and (seen.ngram, seen.num_dirty, seen.num_clean, seen.num_short) == (9, 2, 3, 1)
    assert seen.dirty_share == 0.4
    assert result.metrics == {"exact_match": wilson(3, 6)}
    assert (seen.dirty, seen.clean) == ({"exact_match": wilson(2, 2)}, {"exact_match": wilson(0, 3)})


def test_a_model_is_asked_in_its_own_tokens(tokenizer) -> None:
    path, fingerprint = Path("step-5"), tokenizer.fingerprint
    check_tokenizer(tokenizer, fingerprint, 380, path)
    check_tokenizer(tokenizer, None, 384, path)
    with pytest.raises(UserError, match="step-5 was trained with another tokenizer"):
        check_tokenizer(tokenizer, "0" * 32, 380, path)
    with pytest.raises(UserError, match="the tokenizer has 380 tokens and step-5 knows 379"):
        check_tokenizer(tokenizer, fingerprint, 379, path)
