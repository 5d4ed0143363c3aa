"""Tasks of the lm-evaluation-harness with texts of ours: YAML files and the data beside them."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "and",
    "dog",
    "log",
    "where",
    "did",
    "sit",
    "said",
    "so",
    "a",
    "of",
    "Paris",
    "17",
    "naïve?",
]
CHOICE, ROLLING, FREE = "tiny_choice", "tiny_rolling", "tiny_free"


def write_tasks(folder: Path) -> Path:
    """One of each kind. Some texts are longer than a context of 32 tokens, some prompts are empty."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    questions = [
        {"q": words(draw.randrange(1, 12)), "c": [words(draw.randrange(1, 4)) for _ in range(3)], "label": number % 3}
        for number in range(20)
    ]
    _write(
        folder,
        CHOICE,
        questions,
        output_type="multiple_choice",
        doc_to_text="{{q}}?",
        doc_to_choice="{{c}}",
        doc_to_target="label",
        fewshot_split="test",
        metric_list=[{"metric": name} for name in ("acc", "acc_norm", "acc_mutual_info")],  # the last asks of nothing
    )
    _write(
        folder,
        ROLLING,
        [{"t": words(count)} for count in (1, 5, 30, 80)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{t}}",
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    _write(
        folder,
        FREE,
        [{"t": words(count), "a": "llll"} for count in (1, 5, 30, 2, 3, 7, 9)],
        output_type="generate_until",
        doc_to_text="{{t}}",
        doc_to_target="a",
        generation_kwargs={"until": ["\n", "o", "on "], "max_gen_toks": 10, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    return folder


def _write(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(each)}\n" for each in documents))
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(task | settings))


def flat(value: Any) -> list[Any]:
    """Without the harness's nesting of answers in lists and pairs."""
    return [each for item in value for each in flat(item)] if isinstance(value, list | tuple) else [value]
