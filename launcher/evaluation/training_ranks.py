"""Judges checkpoints by what the training ranks have answered between two steps (`evaluation.where: ranks`)."""

import logging
import time
from pathlib import Path

from launcher.evaluation.judge import Judge
from launcher.evaluation.service import EvaluationService, Record
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import read_manifest
from trainer.config import UserError
from trainer.events import Event, last_sound_step
from trainer.run_dir import RunDir

_log = logging.getLogger(__name__)


class TrainingRanksService(EvaluationService):
    """Grades each answer once, and keeps none."""

    def __init__(self, run_dir: RunDir, judge: Judge, record: Record, *, end_seconds: float = 10.0) -> None:
        super().__init__(run_dir, judge, record, end_seconds=end_seconds)
        self._heard: dict[str, set[int]] = {"checkpoint_saved": set(), "answered": set()}
        """Steps; answers come before or after the checkpoint that they are of is committed."""
        self._left: list[int] = []
        """Steps to grade."""

    def _look_for_unjudged(self) -> None:
        """Also of checkpoints that are gone: that is recorded then."""
        answers = self._run_dir.evaluation.glob(f"step-*.{self._asked}.answers.jsonl")
        names = (path.name.partition(".")[0] for path in answers)
        self._left = sorted(step for name in names if (step := store.step_of(name)) is not None)

    def _hear(self, event: Event) -> None:
        if event["kind"] in self._heard:
            step = event["step"]
            self._heard[event["kind"]].add(step)
            if all(step in steps for steps in self._heard.values()):
                self._left = [*(each for each in self._left if each != step), step]
        elif (start := last_sound_step(event)) is not None:
            self._left = [each for each in self._left if each <= start]
            for steps in self._heard.values():
                steps.intersection_update(range(start + 1))

    def _go_on(self) -> bool:
        if not self._left:
            return False
        try:
            self._grade(self._left[0])
        finally:  # once, whatever comes of it
            self._left = self._left[1:]
        return True

    def _grade(self, step: int) -> None:
        began, checkpoint, answers = time.monotonic(), self._checkpoint(step), self._answers(step)
        try:
            self._tell(checkpoint, read_manifest(checkpoint), answers, None, began)
        except UserError as error:
            self._skip(step, str(error))
        except OSError as error:
            self._fail(step, f"what was found could not be kept: {error}")
        except Exception as error:
            _log.exception("step %d could not be judged", step)
            self._fail(step, f"{type(error).__name__}: {error}")
        if not self._is_closed.is_set():
            answers.unlink(missing_ok=True)

    def _answers(self, step: int) -> Path:
        return self._run_dir.answers_path(step, self._asked)

    def _steps_to_judge(self) -> tuple[int, ...]:
        return tuple(self._left)

    def _abandon(self) -> None:
        return None  # what is graded has its own end

    def _leave(self, reason: str | None) -> None:
        if reason is not None:
            for step in self._left:
                self._skip(step, reason)
