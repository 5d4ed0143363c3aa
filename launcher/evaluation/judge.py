"""What checkpoints are asked, and what their answers are worth: a battery of tasks, and what it found."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.publishing import TOKENIZER_FOLDER
from launcher.evaluation.battery import Battery
from launcher.evaluation.contamination import TaskOverlap, find_overlaps
from launcher.evaluation.finding import LoadedTask, load_tasks
from launcher.evaluation.results import EvaluationResults
from launcher.evaluation.tokens import FolderTokenizer
from trainer.config import RunConfig, UserError
from trainer.inference.requests import Answer, Request
from trainer.progress import Advance, unheard


@dataclass
class Judge:
    """One battery for many checkpoints."""

    battery: Battery
    precision: str
    """In which those who answer compute."""
    find_overlaps: Callable[[], Mapping[str, TaskOverlap]] | None = None
    """Of the tasks with the training text; None where nobody asks."""
    _overlaps: Mapping[str, TaskOverlap] | None = None

    @property
    def requests(self) -> Sequence[Request]:
        return self.battery.requests

    def results(
        self, checkpoint: str, step: int | None, answers: Sequence[Answer], heldout: dict[str, Any] | None
    ) -> EvaluationResults:
        """
        Args:
            checkpoint: its name, for a person.
            heldout: `trainer.evaluate.heldout.HeldoutResult` as a tree, where it was measured.

        Raises:
            UserError: the training text cannot be read, which was to be compared with.
        """
        if self.find_overlaps is not None and self._overlaps is None:
            self._overlaps = self.find_overlaps()
        return EvaluationResults(
            checkpoint=checkpoint,
            step=step,
            tokenizer_fingerprint=self.battery.tokenizer.fingerprint,
            battery_fingerprint=self.battery.fingerprint,
            context_tokens=self.battery.context_tokens,
            seed=self.battery.seed,
            precision=self.precision,
            heldout=heldout,
            tasks=tuple(self.battery.grade(answers, self._overlaps)),
        )


def judge_of(config: RunConfig, prepared: Path) -> Judge:
    """That of a run.

    Args:
        prepared: its data.

    Raises:
        UserError: a task is unknown or wrong.
    """
    wanted = config.evaluation
    tokenizer = FolderTokenizer.load(prepared / TOKENIZER_FOLDER)
    return judge_by(wanted.tasks, config, prepared, tokenizer, wanted.max_examples, contamination=wanted.contamination)


def judge_by(
    names: Sequence[str],
    config: RunConfig,
    prepared: Path | None,
    tokenizer: FolderTokenizer,
    max_examples: int | None,
    *,
    contamination: bool,
    advance: Advance = unheard,
) -> Judge:
    """By tasks of these names, for the context and the seed of a config.

    Args:
        prepared: data to make held-out tasks of, and to look for overlaps in.
        contamination: whether to look for them; `advance` hears how many tokens of how many were compared.

    Raises:
        UserError: a task is unknown or wrong, or there is no data to compare it with.
    """
    tasks = limited(load_tasks(names, prepared, config.seed), max_examples, config.seed)
    battery = Battery.of(tasks, tokenizer, config.model.seq_length, config.seed)
    if not (contamination and tasks):
        return Judge(battery, config.train.precision)
    if prepared is None:
        raise UserError("--contamination compares tasks with training text, and no data is known; name it by --data")
    return Judge(battery, config.train.precision, lambda: find_overlaps(tasks, prepared, advance))


def limited(tasks: Sequence[LoadedTask], max_examples: int | None, seed: int) -> list[LoadedTask]:
    """With no more examples of each than so many, drawn by the seed."""
    return [_limited(loaded, max_examples, seed) for loaded in tasks]


def _limited(loaded: LoadedTask, max_examples: int | None, seed: int) -> LoadedTask:
    if max_examples is None or len(loaded.test) <= max_examples:
        return loaded
    chosen = random.Random(f"{seed}:{loaded.task.name}").sample(range(len(loaded.test)), max_examples)
    return replace(loaded, test=tuple(loaded.test[number] for number in sorted(chosen)))
