"""Grades and intervals, beside worked examples and other implementations."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from launcher.evaluation.examples import Example
from launcher.evaluation.grading import NOT_FINITE, Grade, grade_choices, grade_cloze, grade_text, measures
from launcher.evaluation.intervals import measure, wilson
from launcher.evaluation.matching import cut_at, exact_match, f1, normalized_match
from launcher.evaluation.task import Task
from launcher.evaluation.tokens import FolderTokenizer
from trainer.inference.requests import Generated, Scored


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [  # worked by hand: precision p, recall r, 2pr / (p + r)
        ("The cat sat.", ["a cat sat down"], 0.8),  # {cat, sat} of {cat, sat, down}: p 1, r 2/3
        ("cat cat dog", ["cat dog dog"], 2 / 3),  # cat once and dog once: p 2/3, r 2/3
        ("in the year 1914", ["1914", "In 1914"], 0.8),  # best is the second: p 2/3, r 1
        ("paris", ["London"], 0.0),
        ("the", ["an"], 1.0),  # nothing is left of either
        ("", ["London"], 0.0),
        ("서울 특별시", ["서울"], 2 / 3),
    ],
)
def test_f1_as_squad(text: str, answers: list[str], score: float) -> None:
    assert f1(text, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "answers", "exact", "normalized"),
    [
        (" -19 ", ["-19"], 1, 1),
        ("19", ["-19"], 0, 1),
        ("The Answer!", ["answer"], 0, 1),
        ("a  b", ["b"], 0, 1),
        ("b", ["c", " b"], 1, 1),
        ("theatre", ["atre"], 0, 0),
    ],
)
def test_matches(text: str, answers: list[str], exact: float, normalized: float) -> None:
    assert (exact_match(text, answers), normalized_match(text, answers)) == (exact, normalized)


def test_text_ends_before_the_first_stop() -> None:
    assert cut_at("one\ntwo. three", ["three", ".", "\n"]) == "one"
    assert cut_at("one", ["\n"]) == "one" and cut_at("\none", ["\n"]) == ""


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_of_shares_are_scipys(counts: tuple[int, int]) -> None:
    found, expected = wilson(*counts), binomtest(*counts).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_intervals_of_means_are_those_of_theory() -> None:
    """Of many values the bootstrap's is the normal one: half as wide on each side as 1.96 standard errors."""
    values = [math.sin(number) for number in range(400)]
    found = measure(values, is_share=False, seed=1)
    half = 1.96 * statistics.pstdev(values) / math.sqrt(len(values))
    assert found is not None and found.value == pytest.approx(statistics.mean(values))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found == measure(values, is_share=False, seed=1) != measure(values, is_share=False, seed=2)
    assert measure([], is_share=True) is None


def choice_task(normalization: str) -> Task:
    return Task(
        name="t", kind="multiple_choice", prompt="?", test="t", choices="c", normalization=normalization,
        metrics=("accuracy", "answer_logprob"),
    )  # fmt: skip


def test_each_normalization_chooses_by_its_own_score() -> None:
    """Three answers, each of which one of the rules prefers; worked by hand."""
    example = Example("", "?", (" a", " b", " c"), right=2)
    scored = [Scored((-2.0,), False), Scored((-1.0, -1.5), False), Scored((-1.5, -1.5, -1.5), False)]
    generic = [Scored((-1.0,), False), Scored((-1.0, -1.0), False), Scored((-3.0, -3.0, -3.0), False)]
    said = {
        rule: grade_choices(choice_task(rule), example, scored, generic) for rule in ("sum", "tokens", "answer_context")
    }
    assert said["sum"].said == " a"  # -2 against -2.5 and -4.5
    assert said["tokens"].said == " b"  # -1.25 against -2 and -1.5
    assert said["answer_context"].said == " c"  # -1, -0.5 and 4.5 above what they are worth by themselves
    assert said["answer_context"].values == {"accuracy": 1.0, "answer_logprob": -1.5}
    assert said["sum"].values == {"accuracy": 0.0, "answer_logprob": -1.5}


def test_a_model_that_says_nothing_finite_is_not_graded() -> None:
    example = Example("", "?", (" a", " b"))
    broken = [Scored((math.nan,), False), Scored((-1.0,), True)]
    assert grade_choices(choice_task("sum"), example, broken, []).skipped == NOT_FINITE
    cloze = Task(name="t", kind="cloze", prompt="?", test="t")
    assert grade_cloze(cloze, Scored((-math.inf,), False)).skipped == NOT_FINITE
    assert grade_cloze(cloze, Scored((-1.0, -2.0), True)).values == {"accuracy": 1.0}


def test_generated_text_is_cut_and_compared(tokenizer: FolderTokenizer) -> None:
    task = Task(name="t", kind="generate", prompt="?", test="t", metrics=("exact_match", "f1"), stop=("\n", "END"))
    example = Example("", "?", (" the dog",))

    def grade(*tokens: int) -> Grade:
        return grade_text(task, example, Generated(tokens), tokenizer)

    dog, fox = tokenizer.encode(" the dog"), tokenizer.encode(" the fox")
    assert grade(*dog).values == grade(*dog, tokenizer.end_of_text_id, *fox).values == {"exact_match": 1.0, "f1": 1.0}
    assert grade(*tokenizer.encode(" the dog\nQ: the")).values["exact_match"] == 1.0
    assert grade(*tokenizer.encode(" the dogEND the")).values["exact_match"] == 1.0
    assert grade(*tokenizer.encode("\n the dog")).said == ""
    assert grade(*fox).values == {"exact_match": 0.0, "f1": 0.0} and grade().said == ""


def test_skipped_examples_are_no_part_of_a_mean() -> None:
    task = Task(name="t", kind="cloze", prompt="?", test="t")
    grades = [Grade({"accuracy": 1.0}), Grade(skipped="why"), Grade({"accuracy": 0.0})]
    assert measures(task, grades, 0) == {"accuracy": wilson(1, 2)}
    assert measures(task, grades[1:2], 0) == {"accuracy": None}
