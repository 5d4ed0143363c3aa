"""What judges every committed checkpoint beside training, whoever computes: a thread of its own.

It learns of checkpoints from the record of the run, as everybody does: neither the supervisor nor the ranks ever wait
for it. What goes wrong with one checkpoint is recorded, and the next one is taken.
"""

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.evaluation.judge import Judge
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.format.results import write_results
from trainer.events import Event, EventReader
from trainer.inference.requests import read_answers, requests_fingerprint, write_requests
from trainer.progress import Update, unheard
from trainer.run_dir import RunDir

Record = Callable[..., None]
"""Appends an event of a kind with its fields."""

LOOK_SECONDS = 0.2
_MOST_FAILURES = 5  # in a row, after which it would only fail again
_NOTHING_MORE = f"after {_MOST_FAILURES} failures in a row nothing more is judged"

_log = logging.getLogger(__name__)


class EvaluationService(ABC):
    """From its start until it is closed; a context manager, which does not wait for what is still to be judged."""

    def __init__(self, run_dir: RunDir, judge: Judge, record: Record, *, end_seconds: float = 10.0) -> None:
        """
        Args:
            end_seconds: to give up what it works on when it is closed. A search through all training text takes longer,
                and is left alone.
        """
        self._run_dir, self._judge, self._record = run_dir, judge, record
        self._events = EventReader(run_dir.events_path)
        self._end_seconds = end_seconds
        self._is_closed, self._is_idle = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluation service", daemon=True)
        self._num_judged = self._num_failures = 0
        """Failures in a row."""
        self._asked = ""
        """Fingerprint of the requests."""

    def __enter__(self) -> "EvaluationService":
        self._events.skip_to_end()
        self._run_dir.evaluation.mkdir(exist_ok=True)
        write_requests(self._run_dir.requests_path, self._judge.requests)
        self._asked = requests_fingerprint(self._run_dir.requests_path)
        self._look_for_unjudged()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._thread.join(self._end_seconds)

    def is_idle(self) -> bool:
        """Whether all that was committed so far has been judged or left out."""
        return self._is_idle.is_set() or not self._thread.is_alive()

    def finish(self, update: Update = unheard) -> None:
        """Wait until it is idle."""
        self._is_idle.clear()
        while not self.is_idle():
            steps = self._steps_to_judge()
            doing = f"evaluate: step {steps[0]}" if steps else "evaluate"
            update(doing, self._num_judged, self._num_judged + len(steps), "checkpoints")
            time.sleep(LOOK_SECONDS / 2)

    # --------------------------------------------------------------------------------------------- what differs by kind

    @abstractmethod
    def _look_for_unjudged(self) -> None:
        """Take what earlier commands have left as if it had just been committed, or answered."""

    @abstractmethod
    def _hear(self, event: Event) -> None:
        """Of the record."""

    @abstractmethod
    def _go_on(self) -> bool:
        """Do a little; returns whether there was something to do."""

    @abstractmethod
    def _steps_to_judge(self) -> tuple[int, ...]:
        """Of the checkpoint at work, and of those that wait."""

    @abstractmethod
    def _abandon(self) -> int | None:
        """Give up the checkpoint at work, if there is one; returns its step."""

    @abstractmethod
    def _leave(self, reason: str | None) -> None:
        """The thread ends, with a reason where checkpoints that wait are not judged."""

    # ---------------------------------------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        try:
            while not self._is_closed.is_set() and self._num_failures < _MOST_FAILURES:
                try:
                    self._turn()
                except Exception as error:  # of which nobody thought: it must not end all evaluations
                    _log.exception("the evaluation service met what it cannot handle")
                    self._num_failures += 1
                    if (step := self._abandon()) is not None:
                        self._fail(step, f"{type(error).__name__}: {error}")
        finally:
            self._leave(_NOTHING_MORE if self._num_failures >= _MOST_FAILURES else None)

    def _turn(self) -> None:
        is_asked = not self._is_idle.is_set()
        for event in self._events.new_events():
            self._hear(event)
        if self._go_on():
            return
        if is_asked:
            self._is_idle.set()
        self._is_closed.wait(LOOK_SECONDS)

    def _tell(
        self, checkpoint: Path, manifest: Manifest, answers: Path, heldout: dict[str, Any] | None, began: float
    ) -> None:
        """Grade the answers, and let everybody know."""
        requests = self._judge.requests
        given = read_answers(answers, requests) if requests else []
        results = self._judge.results(checkpoint.name, manifest.step, given, heldout)
        if self._is_closed.is_set():  # the command has ended, and with it the record: the next one judges it
            return
        path = write_results(checkpoint, manifest, results.scores, results.model_dump(mode="json"))
        self._record(
            "checkpoint_evaluated",
            step=manifest.step,
            results=str(path),
            seconds=round(time.monotonic() - began, 3),
            heldout_loss=heldout["loss"] if heldout else None,
            scores={name: value for name, value in results.scores.items() if math.isfinite(value)},
        )
        self._num_judged, self._num_failures = self._num_judged + 1, 0

    def _fail(self, step: int, reason: str) -> None:
        """Record it; whoever calls has counted it."""
        is_last = self._num_failures == _MOST_FAILURES
        self._record("evaluation_failed", step=step, reason=f"{reason}; {_NOTHING_MORE}" if is_last else reason)

    def _skip(self, step: int, reason: str) -> None:
        self._record("evaluation_skipped", step=step, reason=reason)

    def _checkpoint(self, step: int) -> Path:
        return self._run_dir.checkpoints / store.folder_name(step)
