"""Tasks written into files, text that is known, and results."""

import random
from pathlib import Path
from typing import Any

import orjson
import yaml

from launcher.evaluation.intervals import Measure
from launcher.evaluation.results import ContaminationResult, EvaluationResults, TaskResult

TEXTS = (
    "Q: What is the answer to the question?\nA: The answer is a word, and the word is in the context.\n\n",
    "the quick brown fox jumps over the lazy dog while the other foxes were watching the dog sleep",
    "사과는 맛있습니다. 학교에 갑니다. 답: 열두 번째 단어를 말하세요.",
) * 8
RECORDS = [{"question": f"number {n}?", "answer": str(n)} for n in range(6)]
_NAMES = ("anna", "boris", "clara", "david", "edith", "felix", "greta", "henry", "irene", "jonas")
_VERBS = ("met", "saw", "called", "helped", "followed", "praised", "taught", "warned")


def story(seed: int, num_sentences: int = 12) -> str:
    """Sentences of six words that end in a name, each document another."""
    draw = random.Random(seed)
    return " ".join(
        f"On day {draw.randrange(1000)} {draw.choice(_NAMES)} {draw.choice(_VERBS)} {draw.choice(_NAMES)}."
        for _ in range(num_sentences)
    )


def write_task(
    folder: Path,
    records: list[Any] | None = None,
    train_records: list[Any] | None = None,
    name: str = "made",
    **fields: Any,
) -> Path:
    """The path of a task's YAML file, with its records beside it; a field that is None is left out."""
    for split, written in (("test", RECORDS if records is None else records), ("train", train_records)):
        if written is not None:
            path = folder / f"{name}.{split}.jsonl"
            path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in written))
            fields = {split: path.name} | fields
    tree = {"kind": "generate", "prompt": "Q: {question}\nA:"} | fields
    path = folder / f"{name}.yaml"
    tree = {key: value for key, value in tree.items() if value is not None}
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def results_at(step: int) -> EvaluationResults:
    """Of a task with everything that can be said of one; accuracy grows with the step."""
    accuracy = 0.5 + step / 300
    seen = ContaminationResult(
        ngram=9,
        num_clean=60,
        num_dirty=20,
        num_short=17,
        clean={"accuracy": Measure(0.5, 0.4, 0.6), "answer_logprob": Measure(-1.6, -1.8, -1.4)},
        dirty={"accuracy": Measure(0.9, 0.7, 1.0), "answer_logprob": None},
    )
    counts: dict[str, Any] = {"num_truncated": 2, "min_demonstrations": 0, "mean_demonstrations": 0.0, "chance": 0.5}
    first = TaskResult(
        task="larger",
        shots=0,
        metrics={
            "accuracy": Measure(accuracy, accuracy - 0.1, accuracy + 0.09),
            "answer_logprob": Measure(-1.5, -1.7, -1.3),
        },
        num_examples=97,
        skipped={"answer has no tokens": 3},
        contamination=seen,
        **counts,
    )
    shown = counts | {"num_truncated": 0, "min_demonstrations": 2, "mean_demonstrations": 5.5}
    more = round(accuracy + 0.1, 3)
    second = TaskResult(
        task="larger", shots=8, metrics={"accuracy": Measure(more, 0.6, 0.9)}, num_examples=100, skipped={}, **shown
    )
    nothing = TaskResult(task="copying", shots=0, metrics={"exact_match": None}, num_examples=0, skipped={}, **counts)
    return EvaluationResults(
        checkpoint=f"runs/a/step-{step}",
        step=step,
        tokenizer_fingerprint="t" * 32,
        battery_fingerprint="b" * 32,
        context_tokens=128,
        seed=0,
        tasks=(first, second, nothing),
    )
