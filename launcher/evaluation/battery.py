"""Tasks as requests to a model, and its answers as results. Pure: whoever answers is others' business.

The same tasks, tokenizer, context and seed give the same requests, in the same order: for a checkpoint and its export.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson
import xxhash

from launcher.evaluation.contamination import TaskOverlap
from launcher.evaluation.examples import Example
from launcher.evaluation.finding import LoadedTask
from launcher.evaluation.grading import Grade, grade_choices, grade_cloze, grade_text, measures
from launcher.evaluation.prompts import (
    NO_TOKENS,
    TOO_LONG,
    Packed,
    Pair,
    cut_left,
    draw_demonstrations,
    pack_prompt,
    pack_scored,
)
from launcher.evaluation.results import ContaminationResult, TaskResult
from launcher.evaluation.task import Task
from launcher.evaluation.tokens import TextTokenizer, TokenSplitter, stop_ids
from trainer.config import UserError
from trainer.inference.requests import Answer, Generate, Generated, Request, Score, Scored, Tokens

_FORMAT = 1  # of requests and grades: raised when the same tasks come to mean something else


@dataclass(frozen=True)
class Case:
    """One example with one number of demonstrations asked for."""

    number: int
    """Of the example in its task."""
    shots: int
    asked: tuple[int, ...]
    """Places of its requests: of a multiple choice one for each choice."""
    generic: tuple[int, ...] = ()
    """Places of the requests for each choice after the answer context."""
    num_demonstrations: int = 0
    is_truncated: bool = False
    skipped: str | None = None
    """Why nothing is asked."""


@dataclass(frozen=True)
class Battery:
    """What a model is asked, all tasks at once."""

    tasks: tuple[LoadedTask, ...]
    requests: tuple[Request, ...]
    """None of them twice."""
    cases: tuple[tuple[Case, ...], ...]
    """Of each task."""
    tokenizer: TextTokenizer
    context_tokens: int
    seed: int
    fingerprint: str
    """Of all that decides requests and grades: equal ones can be compared with each other."""

    @classmethod
    def of(cls, tasks: Sequence[LoadedTask], tokenizer: TextTokenizer, context_tokens: int, seed: int = 0) -> "Battery":
        """
        Args:
            context_tokens: of the model.
            seed: of demonstrations, sampling and bootstrapped intervals.

        Raises:
            UserError: a task generates more tokens than the context has.
        """
        asking = _Asking(tokenizer, context_tokens, seed)
        cases = tuple(asking.cases_of(loaded) for loaded in tasks)
        requests = tuple(asking.requests)
        return cls(tuple(tasks), requests, cases, tokenizer, context_tokens, seed, asking.fingerprint(tasks))

    def grade(self, answers: Sequence[Answer], overlaps: Mapping[str, TaskOverlap] | None = None) -> list[TaskResult]:
        """A result for each task and number of demonstrations.

        Args:
            answers: to all requests, in their order.
            overlaps: of each task with the training text (`contamination.find_overlaps`), by name.
        """
        if len(answers) != len(self.requests):
            raise ValueError(f"{len(answers)} answers to {len(self.requests)} requests")
        found = []
        for loaded, cases in zip(self.tasks, self.cases, strict=True):
            overlap = (overlaps or {}).get(loaded.task.name)
            for shots in loaded.task.shots:
                mine = [case for case in cases if case.shots == shots]
                grades = [self._grade(loaded, case, answers) for case in mine]
                found.append(_result(loaded, shots, mine, grades, overlap, self.seed))
        return found

    def grades(self, answers: Sequence[Answer]) -> list[tuple[LoadedTask, Case, Grade]]:
        """What came of every single example, to look at."""
        return [
            (loaded, case, self._grade(loaded, case, answers))
            for loaded, cases in zip(self.tasks, self.cases, strict=True)
            for case in cases
        ]

    def _grade(self, loaded: LoadedTask, case: Case, answers: Sequence[Answer]) -> Grade:
        if case.skipped is not None:
            return Grade(skipped=case.skipped)
        task, example = loaded.task, loaded.test[case.number]
        if task.kind == "generate":
            generated = answers[case.asked[0]]
            assert isinstance(generated, Generated)
            return grade_text(task, example, generated, self.tokenizer)
        scored = [_scored(answers[at]) for at in case.asked]
        if task.kind == "cloze":
            return grade_cloze(task, scored[0])
        return grade_choices(task, example, scored, [_scored(answers[at]) for at in case.generic])


class _Asking:
    """Collects requests, each once."""

    def __init__(self, tokenizer: TextTokenizer, context_tokens: int, seed: int) -> None:
        self.requests: dict[Request, int] = {}
        self._tokenizer, self._context_tokens, self._seed = tokenizer, context_tokens, seed
        self._splitter = TokenSplitter(tokenizer)

    def cases_of(self, loaded: LoadedTask) -> tuple[Case, ...]:
        task = loaded.task
        if task.kind == "generate" and task.max_new_tokens >= self._context_tokens:
            raise UserError(
                f"max_new_tokens {task.max_new_tokens} of the task {task.name} leaves no room for a prompt in the "
                f"model's context of {self._context_tokens} tokens; set it to {self._context_tokens - 1} at most"
            )
        stops = stop_ids(self._tokenizer, task.stop) if task.kind == "generate" else ()
        cases = []
        for number, example in enumerate(loaded.test):
            most = draw_demonstrations(loaded.train, example, max(task.shots), task.name, number, self._seed)
            cases += [self._case(task, example, number, shots, most[:shots], stops) for shots in task.shots]
        return tuple(cases)

    def fingerprint(self, tasks: Sequence[LoadedTask]) -> str:
        """Where records lie does not count."""
        told: list[object] = [_FORMAT, self._tokenizer.fingerprint, self._context_tokens, self._seed]
        for loaded in tasks:
            told.append(loaded.task.model_dump(mode="json", exclude={"about", "test", "train"}))
            told += [[each.prompt, each.answers, each.right, each.ending] for each in loaded.test]
        digest = xxhash.xxh3_128(orjson.dumps(told))
        for request in self.requests:
            digest.update(orjson.dumps([type(request).__name__, request]))
        return digest.hexdigest()

    def _case(
        self, task: Task, example: Example, number: int, shots: int, demonstrations: list[Example], stops: Tokens
    ) -> Case:
        if task.kind == "generate":
            packed = pack_prompt(self._splitter, task, example, demonstrations, self._context_tokens)
            decoding = task.decoding.with_seed(self._seed)
            asked = self._place(Generate(packed.pairs[0].context, task.max_new_tokens, stops, decoding))
            return _case(number, shots, packed, (asked,))
        scored = pack_scored(self._splitter, task, example, demonstrations, self._context_tokens)
        if isinstance(scored, str):
            return Case(number, shots, (), skipped=scored)
        generic = self._generic(task, example) if task.normalization == "answer_context" else ()
        if not all(pair.continuation for pair in generic):
            return Case(number, shots, (), skipped=NO_TOKENS)
        if any(len(pair.continuation) > self._context_tokens for pair in generic):
            return Case(number, shots, (), skipped=TOO_LONG)
        return _case(number, shots, scored, self._places(scored.pairs), self._places(generic))

    def _generic(self, task: Task, example: Example) -> tuple[Pair, ...]:
        pairs = [Pair(*self._splitter.split(task.answer_context, answer)) for answer in example.answers]
        return tuple(cut_left(pair, self._context_tokens + 1) for pair in pairs)

    def _places(self, pairs: Sequence[Pair]) -> tuple[int, ...]:
        return tuple(self._place(Score(pair.context, pair.continuation)) for pair in pairs)

    def _place(self, request: Request) -> int:
        return self.requests.setdefault(request, len(self.requests))


def _case(number: int, shots: int, packed: Packed, asked: tuple[int, ...], generic: tuple[int, ...] = ()) -> Case:
    return Case(number, shots, asked, generic, packed.num_demonstrations, packed.is_truncated)


def _result(
    loaded: LoadedTask,
    shots: int,
    cases: Sequence[Case],
    grades: Sequence[Grade],
    overlap: TaskOverlap | None,
    seed: int,
) -> TaskResult:
    task = loaded.task
    used = [case.num_demonstrations for case in cases if case.skipped is None]
    skipped = [grade.skipped for grade in grades if grade.skipped is not None]
    graded = [loaded.test[case.number] for case, grade in zip(cases, grades, strict=True) if grade.skipped is None]
    is_choice = task.kind == "multiple_choice" and graded
    return TaskResult(
        task=task.name,
        shots=shots,
        metrics=measures(task, grades, seed),
        num_examples=len(grades) - len(skipped),
        skipped={reason: skipped.count(reason) for reason in sorted(set(skipped))},
        num_truncated=sum(case.is_truncated for case in cases),
        min_demonstrations=min(used, default=0),
        mean_demonstrations=sum(used) / len(used) if used else 0.0,
        chance=sum(1 / len(each.answers) for each in graded) / len(graded) if is_choice else None,
        contamination=_contamination(task, cases, grades, overlap, seed) if overlap else None,
    )


def _contamination(
    task: Task, cases: Sequence[Case], grades: Sequence[Grade], overlap: TaskOverlap, seed: int
) -> ContaminationResult:
    def those(is_dirty: bool) -> list[Grade]:
        return [grade for case, grade in zip(cases, grades, strict=True) if overlap.is_dirty[case.number] is is_dirty]

    return ContaminationResult(
        ngram=overlap.ngram,
        num_clean=overlap.is_dirty.count(False),
        num_dirty=overlap.is_dirty.count(True),
        num_short=overlap.is_dirty.count(None),
        clean=measures(task, those(False), seed),
        dirty=measures(task, those(True), seed),
    )


def _scored(answer: Answer) -> Scored:
    assert isinstance(answer, Scored)
    return answer
