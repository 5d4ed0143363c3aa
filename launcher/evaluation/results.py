"""What a battery of tasks has found of a checkpoint, and its file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.evaluation.intervals import Measure
from trainer.config import UserError

Measures = dict[str, Measure | None]
"""Of each metric; None where no example could be graded."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ContaminationResult(_Record):
    """Test records that share words with the training text, and how the others fare (GPT-3, appendix C)."""

    ngram: int
    """Words in a row that make one dirty."""
    num_clean: int
    num_dirty: int
    num_short: int
    """Of fewer words, which can never be found: they are neither clean nor dirty."""
    clean: Measures
    """Over the clean ones only."""
    dirty: Measures

    @property
    def dirty_share(self) -> float | None:
        """Of those that can be found."""
        known = self.num_clean + self.num_dirty
        return self.num_dirty / known if known else None


class TaskResult(_Record):
    """One task with one number of demonstrations."""

    task: str
    shots: int
    """Demonstrations asked for."""
    metrics: Measures
    num_examples: int
    """That were graded."""
    skipped: dict[str, int]
    """Others, by reason."""
    num_truncated: int
    """Prompts that lost tokens at their left, as they were longer than the context without any demonstration."""
    min_demonstrations: int
    """In the prompt that held fewest, of those asked."""
    mean_demonstrations: float
    chance: float | None = None
    """Accuracy of guessing, where there are choices."""
    contamination: ContaminationResult | None = None

    def measures(self) -> Iterator[tuple[str, Measure]]:
        """(name, measure) of the metrics that there are: `arithmetic_2d_plus/1-shot/exact_match`."""
        for metric, measure in self.metrics.items():
            if measure is not None:
                yield f"{self.task}/{self.shots}-shot/{metric}", measure


class EvaluationResults(_Record):
    """All tasks of a battery on one checkpoint."""

    format_version: Literal[1] = 1
    checkpoint: str
    """Its identity."""
    step: int | None
    """Training steps that it has; None of an exported model."""
    tokenizer_fingerprint: str
    battery_fingerprint: str
    context_tokens: int
    seed: int
    precision: str | None = None
    """Of the arithmetic; None of results that older versions have kept."""
    heldout: dict[str, Any] | None = None
    """Loss on held-out text, whole and in parts (`trainer.evaluate.heldout.HeldoutResult`), where it was measured."""
    tasks: tuple[TaskResult, ...]

    @property
    def scores(self) -> dict[str, float]:
        """Every metric by its name; the larger, the better."""
        return {name: measure.value for result in self.tasks for name, measure in result.measures()}

    def as_tree(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "scores": self.scores}

    @classmethod
    def of(cls, tree: Mapping[str, Any], path: Path) -> Self:
        """From `as_tree`, or a part of a file that has it.

        Raises:
            UserError: it is of another version; names the path.
        """
        try:
            return cls.model_validate({name: value for name, value in tree.items() if name != "scores"})
        except ValidationError as error:
            raise UserError(f"{path} holds no results of this version; remove it and evaluate again") from error


def check_comparable(results: Sequence[EvaluationResults]) -> None:
    """Raises:
    UserError: they answer different questions, or were computed differently.
    """
    for one in results[1:]:
        if one.precision != results[0].precision:
            raise UserError(
                f"{one.checkpoint} was judged in {one.precision} and {results[0].checkpoint} in "
                f"{results[0].precision}, which alone changes scores; evaluate both in one precision"
            )
        if one.battery_fingerprint != results[0].battery_fingerprint:
            raise UserError(
                f"{one.checkpoint} and {results[0].checkpoint} were asked different things (battery "
                f"{one.battery_fingerprint} and {results[0].battery_fingerprint}); evaluate both with the same tasks, "
                "context and seed"
            )
