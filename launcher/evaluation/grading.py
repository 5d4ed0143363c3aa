"""What the answers to one example are worth, and what the outcomes of all examples are worth together. Pure."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from launcher.evaluation import matching
from launcher.evaluation.examples import Example
from launcher.evaluation.intervals import Measure, measure
from launcher.evaluation.task import Metric, Task
from launcher.evaluation.tokens import TextTokenizer
from trainer.inference.requests import Generated, Scored

NOT_FINITE = "log-probability is not finite"

_SHARES: tuple[Metric, ...] = ("accuracy", "exact_match", "normalized_match")
_MATCHES: dict[Metric, Callable[[str, Iterable[str]], float]] = {
    "exact_match": matching.exact_match,
    "normalized_match": matching.normalized_match,
    "f1": matching.f1,
}


@dataclass(frozen=True)
class Grade:
    """What came of one example."""

    values: dict[Metric, float] = field(default_factory=dict)
    """Of each metric of its task; empty if skipped."""
    said: str = ""
    """The answer that the model chose or wrote; of a cloze only whether it was right."""
    skipped: str | None = None
    """Why there is nothing to grade."""


def grade_choices(task: Task, example: Example, scored: Sequence[Scored], generic: Sequence[Scored]) -> Grade:
    """The choice with the largest score is the model's, of equal ones the first.

    Args:
        scored: of each choice.
        generic: of each choice after the answer context, where the task is normalised by that.
    """
    sums = [sum(each.logprobs) for each in scored]
    if task.normalization == "tokens":
        scores = [total / len(each.logprobs) for total, each in zip(sums, scored, strict=True)]
    elif task.normalization == "answer_context":
        scores = [total - sum(each.logprobs) for total, each in zip(sums, generic, strict=True)]
    else:
        scores = sums
    if not all(map(math.isfinite, [*sums, *scores])):
        return Grade(skipped=NOT_FINITE)
    chosen = max(range(len(scores)), key=scores.__getitem__)
    right = sums[example.right] / len(scored[example.right].logprobs)
    return Grade(
        _wanted(task, {"accuracy": float(chosen == example.right), "answer_logprob": right}), example.answers[chosen]
    )


def grade_cloze(task: Task, scored: Scored) -> Grade:
    """Right if every token of the answer is the likeliest in its place."""
    logprob = sum(scored.logprobs) / len(scored.logprobs)
    if not math.isfinite(logprob):
        return Grade(skipped=NOT_FINITE)
    said = "the answer" if scored.is_greedy else "something else"
    return Grade(_wanted(task, {"accuracy": float(scored.is_greedy), "answer_logprob": logprob}), said)


def grade_text(task: Task, example: Example, generated: Generated, tokenizer: TextTokenizer) -> Grade:
    """The text before the end-of-text token and the first stop text, compared with every right answer."""
    tokens = generated.tokens
    if tokenizer.end_of_text_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.end_of_text_id)]
    text = matching.cut_at(tokenizer.decode(tokens), task.stop)
    return Grade({name: _MATCHES[name](text, example.answers) for name in task.metric_names}, text)


def measures(task: Task, grades: Sequence[Grade], seed: int) -> dict[str, Measure | None]:
    """Of each metric, over the examples that were graded; None where none was."""
    graded = [grade for grade in grades if grade.skipped is None]
    return {
        name: measure([grade.values[name] for grade in graded], is_share=name in _SHARES, seed=seed)
        for name in task.metric_names
    }


def _wanted(task: Task, values: dict[Metric, float]) -> dict[Metric, float]:
    return {name: values[name] for name in task.metric_names}
