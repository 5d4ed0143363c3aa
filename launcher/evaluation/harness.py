"""Tasks of EleutherAI's lm-evaluation-harness, on any model that answers requests. The only place that knows it.

Importing this raises UserError where the harness is not installed: it is an extra.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.config import UserError
from trainer.inference.requests import Answer, Decoding, Generate, Generated, Request, Score, Scored

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"the lm-evaluation-harness is not installed ({error}); pip install 'broadgauge[harness]'"
    ) from error

Answerer = Callable[[Sequence[Request]], list[Answer]]
"""Answers in the order of the requests; how many it works on at once is its own business."""

_MAX_NEW_TOKENS = 256
"""Where a task says nothing; the harness's own default."""
_DECODING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
"""The harness's name of an option -> ours."""
_NUM_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the same; the harness heeds the first that is there."""
_UNVERSIONED = "Yaml"
"""The harness's word."""


class TextTokenizer(Protocol):
    """Plain text to token ids, with none added, and back."""

    @property
    def end_of_text_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class HarnessResult:
    """One metric of one task, or of a group of tasks."""

    task: str
    metric: str
    filter: str
    """What the harness made of an answer before it was graded; `none`: nothing."""
    value: float
    stderr: float | None
    num_documents: int
    num_fewshot: int | None
    """Examples in each prompt; of a group None."""
    version: str | None
    """Of the task, as its authors count; None if they do not."""


def run_harness(
    answerer: Answerer,
    tokenizer: TextTokenizer,
    context_tokens: int,
    tasks: Sequence[str],
    task_folders: Sequence[Path] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
) -> list[HarnessResult]:
    """Measure a model by tasks, groups and tags of the harness.

    Args:
        task_folders: with YAML files of tasks beside the harness's own, over which they go. Their code is run.
        limit: documents of each task at most.
        num_fewshot: in place of what tasks say, but for those that say 0.
        seed: of the examples in prompts, and of what is drawn.

    Raises:
        UserError: a task is unknown, or its data cannot be had, or it asks for what this model cannot do.
    """
    loaded = load_tasks(tasks, task_folders)
    model = BroadgaugeLM(answerer, tokenizer, context_tokens, seed=seed)
    return reduced(evaluate(model, loaded, limit, num_fewshot, seed))


def evaluate(
    model: Any, tasks: list[Any], limit: int | None = None, num_fewshot: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """All that the harness says, each document's answers among it (`samples`).

    Args:
        model: any of the harness's.
        tasks: of `load_tasks`.
    """
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    none_to_find = TaskManager(include_defaults=False)  # or it would read the thousands of files of all of its own
    found: dict[str, Any] = simple_evaluate(
        model, tasks=tasks, task_manager=none_to_find, limit=limit, num_fewshot=num_fewshot, **seeds
    )
    return found


def load_tasks(names: Sequence[str], folders: Sequence[Path] = ()) -> list[Any]:
    """Tasks and groups of tasks, with their data.

    Raises:
        UserError: one is unknown, or its data cannot be had.
    """
    lacking = [folder for folder in folders if not folder.is_dir()]
    if lacking:
        raise UserError(f"{lacking[0]} is no folder of tasks")
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths)  # which reads thousands of files, in seconds
    return [task for name in names for task in _loaded(manager, name)]


def _loaded(manager: Any, name: str) -> list[Any]:
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise UserError(
            f"the harness has no task {name}; "
            + (f"did you mean {' or '.join(near)}?" if near else "name one of its own, or one of a folder of tasks")
        )
    try:
        found = manager.load([name])
    except Exception as error:  # what the harness and `datasets` raise has no class of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UserError(
            f"the harness's task {name} cannot be loaded ({reason}); its own tasks take their data from the Hugging "
            "Face hub: fetch them where there is a network, or name a folder of tasks with data of yours"
        ) from error
    group = found["groups"].get(name)
    return [group] if group is not None else list(found["tasks"].values())


def reduced(results: dict[str, Any]) -> list[HarnessResult]:
    """What is worth keeping of `evaluate`'s answer."""
    kept = []
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        version = str(results["versions"].get(task, _UNVERSIONED))
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            kept.append(
                HarnessResult(
                    task=task,
                    metric=metric,
                    filter=chosen,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    num_documents=metrics["sample_len"],
                    num_fewshot=results["n-shot"].get(task),
                    version=version if version != _UNVERSIONED else None,
                )
            )
    return kept


class BroadgaugeLM(TemplateLM):
    """Our models, as the harness asks models."""

    def __init__(
        self,
        answerer: Answerer,
        tokenizer: TextTokenizer,
        context_tokens: int,
        prefix_token_id: int | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            prefix_token_id: stands before a text that nothing stands before; the end of the text before it unless said.
            seed: of what is drawn, where a task has it drawn.
        """
        super().__init__()
        self.max_length = context_tokens
        self._answerer, self._text, self._seed = answerer, tokenizer, seed
        self._prefix_token_id = tokenizer.end_of_text_id if prefix_token_id is None else prefix_token_id

    @property
    def eot_token_id(self) -> int:
        return self._text.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._text.encode(string)

    # --------------------------------------------------------------------------------------------------------- scoring

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = [self._score(texts[1], context, continuation) for texts, context, continuation in requests]
        return [(math.fsum(each.logprobs), each.is_greedy) for each in self._scored(scores)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Each text in windows that do not overlap, as long as the context."""
        windows = [[self._score(*window) for window in self._windows(*request.args)] for request in requests]
        answers = iter(self._scored([score for text in windows for score in text]))
        return [math.fsum(x for _ in text for x in next(answers).logprobs) for text in windows]

    def _windows(self, text: str) -> Iterable[tuple[str, list[int], list[int]]]:
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return ((text, *make_disjoint_window(window)) for window in rolling)

    def _score(self, text: str, context: list[int], continuation: list[int]) -> Score:
        """What is too long loses its beginning."""
        if not 1 <= len(continuation) <= self.max_length:
            raise UserError(
                f"{text[:60]!r} has {len(continuation)} tokens that are to be scored, and the model's context is "
                f"{self.max_length}; leave the document out of the task"
            )
        kept = (context + continuation)[-(self.max_length + 1) :]
        return Score(tuple(kept[: -len(continuation)]), tuple(continuation))

    def _scored(self, requests: Sequence[Request]) -> list[Scored]:
        return [each for each in self._answered(requests) if isinstance(each, Scored)]

    # ------------------------------------------------------------------------------------------------------ generating

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        asked = [self._generate(*request.args) for request in requests]
        answers = self._answered([each for each, _ in asked])
        return [
            self._text_until(each.tokens, until)
            for each, (_, until) in zip(answers, asked, strict=True)
            if isinstance(each, Generated)
        ]

    def _generate(self, prompt: str, options: dict[str, Any]) -> tuple[Generate, tuple[str, ...]]:
        """The request, and the strings that end its answer."""
        options = {name: value for name, value in options.items() if value is not None}
        given = options.pop("until", [])
        until = tuple(filter(None, [given] if isinstance(given, str) else given))
        num_tokens = [int(options.pop(name)) for name in _NUM_TOKENS if name in options]
        max_new_tokens = (num_tokens or [_MAX_NEW_TOKENS])[0]
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for {max_new_tokens} new tokens, and the model's context is {self.max_length} with at "
                f"least one of the prompt; set max_gen_toks in its generation_kwargs to {self.max_length - 1} or less"
            )
        tokens = self.tok_encode(prompt)[-room:] or [self.prefix_token_id]
        return Generate(tuple(tokens), max_new_tokens, self._stop_ids(until), self._decoding(options)), until

    def _decoding(self, options: dict[str, Any]) -> Decoding:
        do_sample = options.pop("do_sample", float(options.get("temperature", 0.0)) > 0)
        if options.get("num_beams") == 1:
            del options["num_beams"]
        unknown = sorted(options.keys() - _DECODING.keys())
        if unknown:
            raise UserError(
                f"a task asks for {unknown[0]} {options[unknown[0]]!r} in its generation_kwargs, which is not among "
                f"what can be done here: {', '.join(_DECODING)}; take it out"
            )
        ours = {_DECODING[name]: value for name, value in options.items()}
        ours["temperature"] = float(ours.get("temperature", 1.0)) if do_sample else 0.0
        if ours.get("top_k") == 0:  # transformers' word for all
            del ours["top_k"]
        return Decoding(**ours, seed=self._seed)

    @functools.cache  # noqa: B019  (a model lives as long as its process)
    def _stop_ids(self, until: tuple[str, ...]) -> tuple[int, ...]:
        """Tokens that hold a string to stop at. One that is spread over several tokens is only cut off afterwards."""
        texts = enumerate(self._token_texts)
        stops = {token for token, text in texts if any(each in text for each in until)}
        return tuple(sorted(stops | {self.eot_token_id}))

    @functools.cached_property
    def _token_texts(self) -> list[str]:
        return [self._text.decode([token]) for token in range(self._text.vocab_size)]

    def _text_until(self, tokens: Sequence[int], until: Iterable[str]) -> str:
        text = self._text.decode(tokens[:-1] if tokens and tokens[-1] == self.eot_token_id else tokens)
        for stop in until:
            text = text.partition(stop)[0]
        return text

    def _answered(self, requests: Sequence[Request]) -> list[Answer]:
        return self._answerer(requests) if requests else []
