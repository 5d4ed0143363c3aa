"""GPT-3's ten arithmetic tasks (section 3.9.1): addition and subtraction of 2 to 5 digits, products, three numbers."""

from random import Random

from launcher.evaluation.making.files import MadeTask, Record, below, made, pick

_VERBS = {"plus": "+", "minus": "-", "times": "*"}


def arithmetic() -> list[MadeTask]:
    tasks = [
        _of_two(f"arithmetic_{digits}d_{verb}", digits, verb) for digits in range(2, 6) for verb in ("plus", "minus")
    ]
    return [*tasks, _of_two("arithmetic_2d_times", 2, "times"), _of_three()]


def _of_two(name: str, digits: int, verb: str) -> MadeTask:
    def record(draw: Random) -> Record:
        a, b = below(draw, 10**digits), below(draw, 10**digits)
        return {"a": a, "b": b, "answer": {"plus": a + b, "minus": a - b, "times": a * b}[verb]}

    about = f"{digits}D{_VERBS[verb]} of GPT-3 (section 3.9.1): two numbers below 10^{digits}, drawn uniformly."
    return made(name, _tree(about, f"Q: What is {{a}} {verb} {{b}}?\nA:"), record)


def _of_three() -> MadeTask:
    """One-digit composite: the last two in parentheses."""

    def record(draw: Random) -> Record:
        a, b, c = (below(draw, 10) for _ in range(3))
        first, second = (pick(draw, ("+", "-", "*")) for _ in range(2))
        inner = _value(b, second, c)
        return {"expression": f"{a}{first}({b}{second}{c})", "answer": _value(a, first, inner)}

    about = "1DC of GPT-3 (section 3.9.1): three numbers below 10 and two operations, the last two in parentheses."
    return made("arithmetic_1d_composite", _tree(about, "Q: What is {expression}?\nA:"), record)


def _value(a: int, operation: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def _tree(about: str, prompt: str) -> dict[str, object]:
    return {
        "about": about,
        "kind": "generate",
        "prompt": prompt,
        "shots": [0, 1, 8],
        "max_new_tokens": 16,
        "metrics": ["exact_match"],
    }
