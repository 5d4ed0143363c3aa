"""Tasks that need nothing but the context: what stood there before is said again. Small models learn them first."""

from random import Random

from launcher.evaluation.making.files import MadeTask, Record, below, made, pick, shuffled

_SYLLABLES = tuple(first + last for first in "bdfgklmnprstvz" for last in "aeiou")


def copying() -> list[MadeTask]:
    return [_copy(), _induction(), _larger()]


def _nonsense(draw: Random) -> str:
    return "".join(pick(draw, _SYLLABLES) for _ in range(2 + below(draw, 2)))


def _copy() -> MadeTask:
    def record(draw: Random) -> Record:
        return {"words": " ".join(_nonsense(draw) for _ in range(3 + below(draw, 3)))}

    tree = {
        "about": "Words that mean nothing, to be said once more.",
        "kind": "generate",
        "prompt": "Input: {words}\nOutput:",
        "answer": " {words}",
        "shots": [1, 4],
        "max_new_tokens": 48,
        "metrics": ["exact_match", "f1"],
    }
    return made("copying", tree, record)


def _induction() -> MadeTask:
    def record(draw: Random) -> Record:
        words = [_nonsense(draw) for _ in range(6)]
        again = 1 + below(draw, 4)
        return {"sequence": " ".join([*words, *words[:again]]), "next": words[again]}

    tree = {
        "about": "The next word of a sequence that has begun again: the second half of an induction head's work "
        "(Olsson et al. 2022).",
        "kind": "cloze",
        "prompt": "{sequence}",
        "answer": " {next}",
        "shots": [0],
        "metrics": ["accuracy", "answer_logprob"],
    }
    return made("induction", tree, record)


def _larger() -> MadeTask:
    def record(draw: Random) -> Record:
        a, b = below(draw, 100), below(draw, 100)
        while a == b:
            b = below(draw, 100)
        return {"a": a, "b": b, "choices": [str(each) for each in shuffled(draw, (a, b))], "label": str(max(a, b))}

    tree = {
        "about": "The larger of two numbers below 100; normalised by what each number is worth after `A:` alone.",
        "kind": "multiple_choice",
        "prompt": "Q: Which number is larger, {a} or {b}?\nA:",
        "choices": "choices",
        "normalization": "answer_context",
        "answer_context": "A:",
        "shots": [0, 8],
        "metrics": ["accuracy", "answer_logprob"],
    }
    return made("larger_number", tree, record)
