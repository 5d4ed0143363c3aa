"""Prompts of GPT-3's form (figure G): an instruction, demonstrations, the question; as much as the context holds."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from launcher.evaluation.examples import Example
from launcher.evaluation.task import Task
from launcher.evaluation.tokens import TokenSplitter
from trainer.inference.requests import Tokens

NO_TOKENS = "answer has no tokens"
TOO_LONG = "answer is longer than the context"


@dataclass(frozen=True)
class Pair:
    """A context and what is scored after it."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True)
class Packed:
    """One example's prompts, all with the same demonstrations."""

    pairs: tuple[Pair, ...]
    num_demonstrations: int
    is_truncated: bool
    """Something of the instruction or the question is missing, at the left."""


def prompt_text(task: Task, demonstrations: Sequence[Example], question: str) -> str:
    """Instruction, demonstrations with their answers and the question, as one text."""
    parts = [task.instruction] if task.instruction else []
    return task.separator.join([*parts, *(each.shown for each in demonstrations), question])


def draw_demonstrations(
    train: Sequence[Example], asked: Example, shots: int, task: str, number: int, seed: int
) -> list[Example]:
    """So many examples, drawn for the test example of this number; never itself.

    Those of fewer shots are the first of those of more.
    """
    draw = random.Random(xxhash.xxh3_64_intdigest(f"{seed} {number} {task}".encode()))
    left, drawn = list(range(len(train))), list[Example]()
    while left and len(drawn) < shots:
        at = int(draw.random() * len(left))  # random() is the one method whose stream Python promises to keep
        left[at], left[-1] = left[-1], left[at]
        candidate = train[left.pop()]
        if candidate.prompt != asked.prompt or candidate.answers != asked.answers:
            drawn.append(candidate)
    return drawn


def pack_scored(
    splitter: TokenSplitter, task: Task, asked: Example, demonstrations: Sequence[Example], context_tokens: int
) -> Packed | str:
    """What is scored of an example, or why nothing can be: of each answer the context and the continuation.

    Together they have at most one token more than the model's context, for the last one is never an input.
    Demonstrations are left out from the last on until that holds for every answer; where it does not hold without any,
    the context loses tokens at its left. A continuation is always whole.
    """
    scored = asked.answers if task.kind == "multiple_choice" else asked.answers[:1]

    def pairs(num: int) -> tuple[Pair, ...]:
        context = prompt_text(task, demonstrations[:num], asked.prompt)
        if asked.ending:
            return tuple(Pair(*splitter.split(context + answer, asked.ending)) for answer in scored)
        return tuple(Pair(*splitter.split(context, answer)) for answer in scored)

    room = context_tokens + 1
    num = _most(lambda num: all(_fits(pair, room) for pair in pairs(num)), len(demonstrations))
    packed = pairs(num)
    if not all(pair.continuation for pair in packed):
        return NO_TOKENS
    if any(len(pair.continuation) >= room for pair in packed):
        return TOO_LONG
    is_truncated = not all(_fits(pair, room) for pair in packed)
    return Packed(tuple(cut_left(pair, room) for pair in packed), num, is_truncated)


def pack_prompt(
    splitter: TokenSplitter, task: Task, asked: Example, demonstrations: Sequence[Example], context_tokens: int
) -> Packed:
    """The prompt to go on from, as one pair without a continuation; with `max_new_tokens` it fills the context at most.

    What does not fit is left out as in `pack_scored`.
    """
    room = context_tokens - task.max_new_tokens

    def pair(num: int) -> Pair:
        return Pair(splitter.prompt(prompt_text(task, demonstrations[:num], asked.prompt)), ())

    num = _most(lambda num: _fits(pair(num), room), len(demonstrations))
    return Packed((cut_left(pair(num), room),), num, not _fits(pair(num), room))


def cut_left(pair: Pair, room: int) -> Pair:
    """With at most so many tokens in all, those at the left of the context gone."""
    num_kept = max(0, room - len(pair.continuation))
    return Pair(pair.context[len(pair.context) - min(num_kept, len(pair.context)) :], pair.continuation)


def _fits(pair: Pair, room: int) -> bool:
    return len(pair.context) + len(pair.continuation) <= room


def _most(fits: Callable[[int], bool], most: int) -> int:
    """A number that fits while one more does not; 0 where none is known to."""
    if fits(most):
        return most
    low, high = 0, most  # high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
