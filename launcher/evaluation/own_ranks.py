"""Judges checkpoints on ranks of its own beside training (`evaluation.where: service`), one at a time."""

import logging
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from ray.exceptions import RayError

from launcher.evaluation.judge import Judge
from launcher.evaluation.service import (
    LOOK_SECONDS,
    EvaluationService,
    Record,
)
from launcher.evaluation.waiting import Waiting
from launcher.job.failures import explain
from launcher.job.fleet import Fleet, Life, answer_of
from launcher.supervise.looks import Looks
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest, read_manifest
from trainer.checkpoint.format.results import read_results
from trainer.config import UserError
from trainer.events import Event, last_sound_step
from trainer.rank_spec import Task
from trainer.run_dir import RunDir

_ARRIVAL_SECONDS = 300.0  # for agents of the service to come up
_SILENCE_FACTOR = 6.0  # loading a checkpoint takes longer than a step, and says nothing meanwhile

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


class OwnRanksService(EvaluationService):
    """Takes checkpoints as they are committed; those that wait, by `evaluation.when_behind`."""

    def __init__(
        self,
        run_dir: RunDir,
        judge: Judge,
        record: Record,
        fleet: Fleet,
        when_behind: str,
        *,
        end_seconds: float = 10.0,
    ) -> None:
        super().__init__(run_dir, judge, record, end_seconds=end_seconds)
        self._fleet, self._folder = fleet, run_dir.evaluation
        self._waiting = Waiting("queue" if when_behind == "queue" else "skip")
        self._leases: dict[int, ExitStack] = {}
        self._work: _Work | None = None

    def _look_for_unjudged(self) -> None:
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

    def _steps_to_judge(self) -> tuple[int, ...]:
        work = self._work
        return ((work.step,) if work is not None else ()) + self._waiting.steps

    def _hear(self, event: Event) -> None:
        if event["kind"] == "checkpoint_saved":
            self._committed(event["step"])
        elif (start := last_sound_step(event)) is not None:
            self._void_after(start)

    def _go_on(self) -> bool:
        self._fleet.news()
        if self._work is not None:
            self._work_on(self._work)
            return True
        self._waiting, step = self._waiting.next()
        if step is None:
            return False
        self._begin(step)
        return True

    def _void_after(self, step: int) -> None:
        """What was saved after it is of no history that counts."""
        self._waiting, left_out = self._waiting.void_after(step)
        if self._work is not None and self._work.step > step:
            left_out = self._work.step, *left_out
            self._give_up(self._work)
        for each in left_out:
            self._let_go(each)
            self._skip(each, f"the run goes on from step {step}")

    def _committed(self, step: int) -> None:
        if self._work is not None and self._work.step == step:  # written over by another life
            self._give_up(self._work)
            self._skip(step, "the run went back, and has written it anew")
        self._waiting, left_out = self._waiting.committed(step)
        for each in left_out:
            self._let_go(each)
            self._skip(each, f"the checkpoint of step {step} came before its turn")
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
            self._skip(step, str(error))
            return
        finally:
            self._let_go(step)
        work = _Work(step, checkpoint, manifest, time.monotonic(), lease, [("evaluate", self._folder / "heldout.json")])
        work.left += [("answer", self._folder / "answers.jsonl")] if self._judge.requests else []
        self._work = work

    def _start_task(self, work: _Work) -> None:
        """As soon as the machines of the service are there."""
        if len(self._fleet.present()) < self._fleet.where.nodes:
            if time.monotonic() - work.began > _ARRIVAL_SECONDS:
                self._give_up_on(work, f"the machines of the service did not come up within {_ARRIVAL_SECONDS:g} s")
            self._is_closed.wait(LOOK_SECONDS)
            return
        task, output = work.left[0]
        output.unlink(missing_ok=True)
        try:
            work.life = self._fleet.begin(
                task, checkpoint=work.checkpoint.resolve(), output=output, requests=self._run_dir.requests_path
            )
            work.looks = Looks(work.life.ask_for_beats, answer_of)
        except RayError as error:
            self._give_up_on(work, f"the ranks could not be started: {' '.join(str(error).split())}")

    def _work_on(self, work: _Work) -> None:
        if work.life is None:
            self._start_task(work)
            return
        if (ends := work.life.poll(LOOK_SECONDS)) is None:
            self._watch(work)
            return
        work.life = None
        if any(end.went_wrong for end in ends.values()):
            self._fleet.replace(node for node, end in ends.items() if end.problem)
            self._give_up_on(work, str(explain(ends, self._fleet.job.logs)))
            return
        work.left.pop(0)
        if not work.left:
            self._conclude(work)

    def _watch(self, work: _Work) -> None:
        """Give up ranks that have said nothing for so long that they will not."""
        assert work.looks is not None
        beats = work.looks.look(time.monotonic())
        limit = _SILENCE_FACTOR * self._fleet.job.config.supervise.hang_seconds
        if beats and (silent := min(beat.silent_seconds for beat in beats.values())) > limit:
            self._give_up_on(work, f"its ranks hang: silent for {silent:.0f} s (supervise.hang_seconds)")

    def _conclude(self, work: _Work) -> None:
        try:
            heldout = orjson.loads((self._folder / "heldout.json").read_bytes())
            self._tell(work.checkpoint, work.manifest, self._folder / "answers.jsonl", heldout, work.began)
        except (OSError, UserError) as error:
            self._give_up_on(work, f"what was found could not be graded or kept: {error}")
            return
        except Exception as error:  # of which nobody thought: it must not end all evaluations
            _log.exception("step %d could not be judged", work.step)
            self._give_up_on(work, f"{type(error).__name__}: {error}")
            return
        work.lease.close()
        self._work = None

    def _give_up_on(self, work: _Work, reason: str) -> None:
        self._give_up(work)
        self._num_failures += 1
        self._fail(work.step, reason)

    def _give_up(self, work: _Work) -> None:
        self._work = None
        work.lease.close()
        if work.life is not None:
            with suppress(RayError):
                work.life.kill()

    def _abandon(self) -> int | None:
        work = self._work
        if work is None:
            return None
        self._give_up(work)
        return work.step

    def _let_go(self, step: int) -> None:
        if (lease := self._leases.pop(step, None)) is not None:
            lease.close()

    def _leave(self, reason: str | None) -> None:
        if self._work is not None:
            self._give_up(self._work)
        for step in list(self._leases):
            self._let_go(step)
        if reason is not None:
            for step in self._waiting.steps:
                self._skip(step, reason)
