"""Judges every committed checkpoint, one at a time, beside training: on ranks of its own, or by the answers of the
training ranks.

It learns of checkpoints from the record of the run, as everybody does, and has a thread of its own: neither the
supervisor nor the ranks ever wait for it. What goes wrong with one checkpoint is recorded, and the next one is taken.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from ray.exceptions import RayError

from launcher.evaluation.judge import Judge
from launcher.evaluation.waiting import Waiting
from launcher.job.failures import explain
from launcher.job.fleet import Fleet, Life, answer_of
from launcher.supervise.looks import Looks
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest, read_manifest
from trainer.checkpoint.format.results import read_results, write_results
from trainer.config import UserError
from trainer.events import Event, EventReader
from trainer.inference.requests import read_answers, requests_fingerprint, write_requests
from trainer.progress import Update, unheard
from trainer.rank_spec import Task
from trainer.run_dir import RunDir

Record = Callable[..., None]
"""Appends an event of a kind with its fields."""

_LOOK_SECONDS = 0.2
_ARRIVAL_SECONDS = 300.0  # for agents of the service to come up
_SILENCE_FACTOR = 6.0  # loading a checkpoint takes longer than a step, and says nothing meanwhile
_MOST_FAILURES = 5  # in a row, after which it would only fail again
_NOTHING_MORE = f"after {_MOST_FAILURES} failures in a row nothing more is judged"

_log = logging.getLogger(__name__)


@dataclass
class _Work:
    """One checkpoint at a time."""

    step: int
    checkpoint: Path
    manifest: Manifest
    began: float
    lease: ExitStack
    """Held while ranks read it, so that it is not removed meanwhile."""
    left: list[tuple[Task, Path]]
    """What ranks have still to do, and where they write what they find."""
    life: Life | None = None
    looks: Looks | None = None
    """At the ranks of the life."""


class EvaluationService:
    """From its start until it is closed; a context manager, which does not wait for what is still to be judged."""

    def __init__(
        self,
        run_dir: RunDir,
        judge: Judge,
        when_behind: str,
        record: Record,
        fleet: Fleet | None = None,
        end_seconds: float = 10.0,
    ) -> None:
        """
        Args:
            fleet: ranks of its own; without them it grades what the training ranks have answered.
            end_seconds: to give up what it works on when it is closed. A search through all training text takes longer,
                and is left alone.
        """
        self._run_dir, self._judge, self._record, self._fleet = run_dir, judge, record, fleet
        self._folder = run_dir.evaluation
        self._waiting = Waiting("queue" if when_behind == "queue" else "skip")
        self._leases: dict[int, ExitStack] = {}
        self._events = EventReader(run_dir.events_path)
        self._work: _Work | None = None
        self._heard: dict[str, set[int]] = {"checkpoint_saved": set(), "answered": set()}
        """Steps; answers come before or after the checkpoint that they are of is committed."""
        self._left: list[int] = []
        """Steps of answers that earlier commands have left."""
        self._num_failures, self._end_seconds = 0, end_seconds
        self._is_closed, self._is_idle = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluation service", daemon=True)
        self.num_judged = 0
        self._asked = ""
        """Fingerprint of the requests."""

    def __enter__(self) -> "EvaluationService":
        self._events.skip_to_end()
        self._folder.mkdir(exist_ok=True)
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
            work, waiting = self._work, self._waiting.steps
            doing = f"evaluate: step {work.step}" if work is not None else "evaluate"
            total = self.num_judged + (work is not None) + len(waiting)
            update(doing, self.num_judged, total, "checkpoints")
            time.sleep(_LOOK_SECONDS / 2)

    # ---------------------------------------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        try:
            while not self._is_closed.is_set() and self._num_failures < _MOST_FAILURES:
                try:
                    self._turn()
                except Exception as error:  # of which nobody thought: it must not end all evaluations
                    self._went_wrong(error)
            if self._num_failures >= _MOST_FAILURES:
                for step in self._waiting.steps:
                    self._record("evaluation_skipped", step=step, reason=_NOTHING_MORE)
        finally:
            self._leave()

    def _went_wrong(self, error: Exception) -> None:
        _log.exception("the evaluation service met what it cannot handle")
        if self._work is not None:
            self._fail(self._work, f"{type(error).__name__}: {error}")
        else:
            self._num_failures += 1

    def _turn(self) -> None:
        is_asked = not self._is_idle.is_set()
        for event in self._events.new_events():
            self._hear(event)
        if self._fleet is not None:
            self._fleet.news()
        if self._work is not None:
            self._go_on(self._work)
            return
        if self._left:
            self._grade_answers(self._left.pop(0))
            return
        self._waiting, step = self._waiting.next()
        if step is not None:
            self._begin(step)
            return
        if is_asked:
            self._is_idle.set()
        self._is_closed.wait(_LOOK_SECONDS)

    def _hear(self, event: Event) -> None:
        match event["kind"]:
            case "checkpoint_saved" if self._fleet is not None:
                self._committed(event["step"])
            case "checkpoint_saved" | "answered":
                self._heard[event["kind"]].add(event["step"])
                if all(event["step"] in steps for steps in self._heard.values()):
                    self._grade_answers(event["step"])
            case "training_started" | "rolled_back":
                self._void_after(event["step" if event["kind"] == "training_started" else "to_step"])

    def _void_after(self, step: int) -> None:
        """What was saved after it is of no history that counts."""
        self._waiting, left_out = self._waiting.void_after(step)
        if self._work is not None and self._work.step > step:
            left_out = self._work.step, *left_out
            self._give_up(self._work)
        for each in left_out:
            self._let_go(each)
            self._record("evaluation_skipped", step=each, reason=f"the run goes on from step {step}")
        self._left = [each for each in self._left if each <= step]
        for steps in self._heard.values():
            steps.intersection_update(range(step + 1))

    def _committed(self, step: int) -> None:
        if self._work is not None and self._work.step == step:  # written over by another life
            self._give_up(self._work)
            self._record("evaluation_skipped", step=step, reason="the run went back, and has written it anew")
        self._waiting, left_out = self._waiting.committed(step)
        for each in left_out:
            self._let_go(each)
            self._record("evaluation_skipped", step=each, reason=f"the checkpoint of step {step} came before its turn")
        self._lease(step)

    def _lease(self, step: int) -> None:
        """Keep what waits from being removed, if none is to be left out."""
        if self._waiting.when_behind == "queue":
            self._let_go(step)
            self._leases[step] = ExitStack()
            with suppress(UserError):  # it is missed when its turn comes
                self._leases[step].enter_context(store.being_read(self._checkpoint(step)))

    def _begin(self, step: int) -> None:
        checkpoint, lease = self._checkpoint(step), ExitStack()
        try:
            lease.enter_context(store.being_read(checkpoint))
            manifest = read_manifest(checkpoint)
        except (UserError, OSError) as error:  # the second of a file system without locks
            lease.close()
            self._record("evaluation_skipped", step=step, reason=str(error))
            return
        finally:
            self._let_go(step)
        work = _Work(step, checkpoint, manifest, time.monotonic(), lease, [("evaluate", self._folder / "heldout.json")])
        work.left += [("answer", self._folder / "answers.jsonl")] if self._judge.requests else []
        self._work = work

    def _start_task(self, work: _Work) -> None:
        """As soon as the machines of the service are there."""
        assert self._fleet is not None
        if len(self._fleet.present()) < self._fleet.where.nodes:
            if time.monotonic() - work.began > _ARRIVAL_SECONDS:
                self._fail(work, f"the machines of the service did not come up within {_ARRIVAL_SECONDS:g} s")
            self._is_closed.wait(_LOOK_SECONDS)
            return
        task, output = work.left[0]
        output.unlink(missing_ok=True)
        try:
            work.life = self._fleet.begin(
                task, checkpoint=work.checkpoint.resolve(), output=output, requests=self._run_dir.requests_path
            )
            work.looks = Looks(work.life.ask_for_beats, answer_of)
        except RayError as error:
            self._fail(work, f"the ranks could not be started: {' '.join(str(error).split())}")

    def _go_on(self, work: _Work) -> None:
        if work.life is None:
            self._start_task(work)
            return
        if (ends := work.life.poll(_LOOK_SECONDS)) is None:
            self._watch(work)
            return
        work.life = None
        if any(end.went_wrong for end in ends.values()):
            assert self._fleet is not None
            self._fleet.replace(node for node, end in ends.items() if end.problem)
            self._fail(work, str(explain(ends, self._fleet.job.logs)))
            return
        work.left.pop(0)
        if not work.left:
            self._conclude(work)

    def _watch(self, work: _Work) -> None:
        """Give up ranks that have said nothing for so long that they will not."""
        assert self._fleet is not None and work.looks is not None
        beats = work.looks.look(time.monotonic())
        limit = _SILENCE_FACTOR * self._fleet.job.config.supervise.hang_seconds
        if beats and (silent := min(beat.silent_seconds for beat in beats.values())) > limit:
            self._fail(work, f"its ranks hang: they have said nothing for {silent:.0f} s (supervise.hang_seconds)")

    def _conclude(self, work: _Work) -> None:
        try:
            heldout = orjson.loads((self._folder / "heldout.json").read_bytes())
            self._tell(work.checkpoint, work.manifest, self._folder / "answers.jsonl", heldout, work.began)
        except (OSError, UserError) as error:
            self._fail(work, f"what was found could not be graded or kept: {error}")
            return
        except Exception as error:  # of which nobody thought: it must not end all evaluations
            _log.exception("step %d could not be judged", work.step)
            self._fail(work, f"{type(error).__name__}: {error}")
            return
        work.lease.close()
        self._work, self._num_failures = None, 0
        self.num_judged += 1

    def _fail(self, work: _Work, reason: str) -> None:
        self._num_failures += 1
        self._give_up(work)
        is_last = self._num_failures == _MOST_FAILURES
        self._record("evaluation_failed", step=work.step, reason=f"{reason}; {_NOTHING_MORE}" if is_last else reason)

    def _give_up(self, work: _Work) -> None:
        self._work = None
        work.lease.close()
        if work.life is not None:
            with suppress(RayError):
                work.life.kill()

    # ------------------------------------------------------------------------------------------------------- and grades

    def _grade_answers(self, step: int) -> None:
        """Of the training ranks, once."""
        began, checkpoint, answers = time.monotonic(), self._checkpoint(step), self._answers(step)
        try:
            self._tell(checkpoint, read_manifest(checkpoint), answers, None, began)
        except UserError as error:
            self._record("evaluation_skipped", step=step, reason=str(error))
        except OSError as error:
            self._record("evaluation_failed", step=step, reason=f"what was found could not be kept: {error}")
        except Exception as error:
            _log.exception("step %d could not be judged", step)
            self._record("evaluation_failed", step=step, reason=f"{type(error).__name__}: {error}")
        if not self._is_closed.is_set():
            answers.unlink(missing_ok=True)

    def _answers(self, step: int) -> Path:
        return self._run_dir.answers_path(step, self._asked)

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

    # --------------------------------------------------------------------------------------------------------- the rest

    def _look_for_unjudged(self) -> None:
        """What earlier commands have left: as if it had just been committed, or answered."""
        if self._fleet is None:  # also of checkpoints that are gone: that is recorded then
            names = (path.name.partition(".")[0] for path in self._folder.glob(f"step-*.{self._asked}.answers.jsonl"))
            self._left += sorted(step for name in names if (step := store.step_of(name)) is not None)
            return
        for step in store.steps(self._run_dir.checkpoints):
            checkpoint = self._checkpoint(step)
            try:
                is_judged = self._is_judged(read_results(checkpoint, read_manifest(checkpoint)))
            except UserError:
                continue
            if not is_judged:
                self._waiting, _ = self._waiting.committed(step)
                self._lease(step)

    def _is_judged(self, results: dict[str, Any] | None) -> bool:
        """By what is asked now."""
        evaluation = (results or {}).get("evaluation")
        return isinstance(evaluation, dict) and (
            evaluation.get("battery_fingerprint") == self._judge.battery.fingerprint
        )

    def _checkpoint(self, step: int) -> Path:
        return self._run_dir.checkpoints / store.folder_name(step)

    def _let_go(self, step: int) -> None:
        if (lease := self._leases.pop(step, None)) is not None:
            lease.close()

    def _leave(self) -> None:
        if self._work is not None:
            self._give_up(self._work)
        for step in list(self._leases):
            self._let_go(step)
