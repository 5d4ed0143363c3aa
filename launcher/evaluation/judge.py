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
from trainer.config import RunConfig
from trainer.inference.requests import Answer, Request


@dataclass
class Judge:
    """One battery for many checkpoints."""

    battery: Battery
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
    tasks = limited(load_tasks(wanted.tasks, prepared, config.seed), wanted.max_examples, config.seed)
    tokenizer = FolderTokenizer.load(prepared / TOKENIZER_FOLDER)
    battery = Battery.of(tasks, tokenizer, config.model.seq_length, config.seed)
    return Judge(battery, (lambda: find_overlaps(tasks, prepared)) if wanted.contamination and tasks else None)


def limited(tasks: Sequence[LoadedTask], max_examples: int | None, seed: int) -> list[LoadedTask]:
    """With no more examples of each than so many, drawn by the seed."""
    return [_limited(loaded, max_examples, seed) for loaded in tasks]


def _limited(loaded: LoadedTask, max_examples: int | None, seed: int) -> LoadedTask:
    if max_examples is None or len(loaded.test) <= max_examples:
        return loaded
    chosen = random.Random(f"{seed}:{loaded.task.name}").sample(range(len(loaded.test)), max_examples)
    return replace(loaded, test=tuple(loaded.test[number] for number in sorted(chosen)))
