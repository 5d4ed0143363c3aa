"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from trainer import device as devices
from trainer import parallel, stability
from trainer.agreement import Agreed, Agreement
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.interval import read_history
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.service.room import Room
from trainer.config import RunConfig
from trainer.data.batches import ReadAhead, TrainingData
from trainer.data.digest import as_hex, together
from trainer.data.prepared import PreparedFolder, fingerprints
from trainer.data.windows import HeldoutReader
from trainer.engine.engine import Engine, StepStats
from trainer.evaluate.heldout import HeldoutEvaluation
from trainer.events import read_events
from trainer.heartbeat import Heartbeat
from trainer.inference.answering import answer
from trainer.inference.requests import Request, read_requests, requests_fingerprint, write_answers
from trainer.inference.windows import WindowModel
from trainer.profiling import StepProfiler
from trainer.restore import Progress, Source, restore
from trainer.run_dir import RunDir
from trainer.schedule import Schedule, Step, learning_rate
from trainer.stability import Accept, Decision, RollBack, Skip, Stop, TrainingDiverged
from trainer.stop import StopRequest

Record = Callable[..., None]
"""Appends an event of a kind with its fields; does nothing on ranks that do not write events."""


def train(
    config: RunConfig,
    run_dir: RunDir,
    device: torch.device,
    record: Record,
    room: Room | None = None,
    stop: StopRequest | None = None,
    heartbeat: Heartbeat | None = None,
) -> None:
    """Train from the newest checkpoint, or from the seed, to the end of the run, and evaluate before and after.

    Args:
        room: where a checkpoint service waits for snapshots; without one, training waits while it saves.
        stop: once it is made the run saves and ends; the event `preempted` says so.
        heartbeat: where this rank says what it is doing.

    Raises:
        TrainingDiverged: neither skipping steps nor going back to a checkpoint has helped.
    """
    training = Training(config, run_dir, device, record, room, stop or StopRequest(None), heartbeat or Heartbeat())
    with training.batches, training.profiler:
        training.begin()
        while (place := training.next_step()) is not None:
            decision, agreed = training.advance(place)
            if isinstance(decision, RollBack):
                training.roll_back(decision, place)
                continue
            # before saving: a run that is killed in between comes back to before both, and loses neither
            training.evaluate_if_due()
            training.answer_if_due(decision, agreed)
            training.save_if_due(decision, agreed)
            if agreed.stop:
                training.record_stop()
                return
        training.evaluate_once()


class Training:
    """One rank's part in a run, between its steps."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        device: torch.device,
        record: Record,
        room: Room | None,
        stop: StopRequest,
        heartbeat: Heartbeat,
    ) -> None:
        data = PreparedFolder.open(run_dir.data_for(config))
        samples = TrainingData.open(data, config)
        schedule = Schedule(config)

        def read(step: int) -> torch.Tensor:
            place = schedule.step_after(step)
            return samples.replica_tokens(place.first_sample, place.batch_size, parallel.data_rank())

        heldout = HeldoutReader(data, config.model.seq_length)
        self._config, self._run_dir, self._record, self._room = config, run_dir, record, room
        self._schedule = schedule
        self._evaluation = HeldoutEvaluation(samples, heldout, config, device)
        self._engine = Engine(config, device)
        self._saver = Saver(self._engine, run_dir.checkpoints, room, record)
        self._stop, self._heartbeat, self._device = stop, heartbeat, device
        # rank 0 decides when to save
        events = read_events(run_dir.events_path) if dist.get_rank() == 0 else []
        self.profiler = StepProfiler(run_dir, dist.get_rank(), device, record)
        self._agreement = Agreement(config, stop, read_history(events), is_profile_asked=self.profiler.is_asked)
        self.batches = ReadAhead(read, schedule.num_steps, config.train.micro_batch_size, device)
        self._progress = Progress()
        self._saved_step = 0
        self._evaluated: tuple[int, float] | None = None  # step and held-out loss of the last evaluation
        self._requests, self._asked = _requests(config, run_dir)

    def begin(self) -> None:
        """Go on from wherever the run can."""
        self._heartbeat.phase("restoring")
        self._saver.take_over()
        source = self._restore()
        self._record(
            "training_started",
            step=self._progress.step,
            checkpoint=source.shown,
            tier=source.tier,
            threads_per_rank=torch.get_num_threads(),
            ranks=dist.get_world_size(),
            device=devices.name_of(self._device),
        )
        if not source.is_own:
            self.evaluate_once()

    def next_step(self) -> Step | None:
        step = self._progress.step
        return self._schedule.step_after(step) if step < self._schedule.num_steps else None

    # ------------------------------------------------------------------------------------------------------------ steps

    def advance(self, place: Step) -> tuple[Decision, Agreed]:
        """Do a step, or pass it over; a step that is not to be rolled back is done.

        Raises:
            TrainingDiverged: see `train`.
        """
        if place.number in self._progress.stability.quarantined:
            return self._pass_over(place)
        self.profiler.before(place.number)
        started = time.perf_counter()
        state = self._progress.stability
        self._heartbeat.phase("loading data")
        batch = self.batches.micro_batches(place.number - 1)
        lr = learning_rate(self._config, place.tokens_after)

        def is_sound(loss: float, grad_norm: float) -> bool:
            return stability.fault(self._config.stability, state, loss, grad_norm) is None

        self._heartbeat.phase("computing")
        stats = self._engine.train_step(batch, lr, place.number - 1, is_sound, self._heartbeat.phase)
        decision, state = stability.judge(self._config.stability, state, place.number, stats.loss, stats.grad_norm)
        assert stats.updated == isinstance(decision, Accept)
        agreed = self._agree(place, self.batches.digest(place.number - 1))
        self._record_step(place, decision, stats, agreed, lr, time.perf_counter() - started)
        if isinstance(decision, Stop):
            self._record("diverged", verdict=decision.verdict)
            dist.barrier()  # once a rank has raised, the others are killed: not before it is recorded
            raise TrainingDiverged(decision.verdict)
        if not isinstance(decision, RollBack):
            digest = together(self._progress.data_digest, agreed.data_digest)
            self._progress = Progress(place.number, state, digest)
        else:
            self._progress = replace(self._progress, stability=state)
        return decision, agreed

    def _pass_over(self, place: Step) -> tuple[Decision, Agreed]:
        """Consume the samples of a quarantined step."""
        agreed = self._agree(place, 0)
        self._record_skip(place, "quarantined", None, None)
        state = stability.pass_over(self._progress.stability, place.number)
        self._progress = replace(self._progress, step=place.number, stability=state)
        return Skip("quarantined"), agreed

    def _agree(self, place: Step, data_digest: int) -> Agreed:
        self._heartbeat.phase("agreeing")
        agreed = self._agreement.after_step(place.number, data_digest)
        self._heartbeat.step_done(place.number)
        self.profiler.after(place.number)
        if agreed.profile:
            self.profiler.hear(place.number)
        return agreed

    def _record_step(
        self, place: Step, decision: Decision, stats: StepStats, agreed: Agreed, lr: float, seconds: float
    ) -> None:
        tokens_xxh3 = as_hex(agreed.data_digest)
        if not isinstance(decision, Accept):
            self._record_skip(place, decision.reason, stats, tokens_xxh3)
            return
        self._record(
            "step",
            step=place.number,
            tokens=place.tokens_after,
            first_sample=place.first_sample,
            num_samples=place.batch_size,
            tokens_xxh3=tokens_xxh3,
            loss=stats.loss,
            grad_norm=stats.grad_norm,
            lr=lr,
            seconds=round(seconds, 6),
            phases={phase: round(each, 6) for phase, each in self._heartbeat.last_step.seconds.items()},
        )

    def _record_skip(self, place: Step, reason: str, stats: StepStats | None, tokens_xxh3: str | None) -> None:
        self._record(
            "step_skipped",
            step=place.number,
            first_sample=place.first_sample,
            num_samples=place.batch_size,
            tokens_xxh3=tokens_xxh3,
            reason=reason,
            loss=stats.loss if stats else None,
            grad_norm=stats.grad_norm if stats else None,
        )

    # ------------------------------------------------------------------------------------------------------- evaluation

    def evaluate_if_due(self) -> None:
        step, every = self._progress.step, self._config.evaluation.every_steps
        if step == self._schedule.num_steps or (every and step % every == 0):
            self.evaluate_once()

    def evaluate_once(self) -> None:
        """Evaluate the weights as they are, unless that has been done."""
        step = self._progress.step
        if self._evaluated is None or self._evaluated[0] != step:
            self._heartbeat.phase("evaluating")
            result = self._evaluation.run(self._engine.evaluate)
            self._record("evaluated", step=step, **result.as_event())
            self._evaluated = step, result.loss

    def answer_if_due(self, decision: Decision, agreed: Agreed) -> None:
        """Answer what tasks ask of the weights that are about to be saved for good; there is no time for it at an end
        that somebody waits for."""
        is_due = self._is_last or (isinstance(decision, Accept) and (agreed.save or agreed.stop))
        if not (self._requests and is_due):
            return
        began, step = time.perf_counter(), self._progress.step
        if agreed.stop:
            self._record("evaluation_skipped", step=step, reason="the run was asked to end, and had no time to answer")
            return
        self._heartbeat.phase("evaluating")
        model = WindowModel(self._engine.stages, self._config, self._device)
        answers = answer(model, self._requests, advance=lambda *_: self._heartbeat.phase("evaluating"))
        path = self._run_dir.answers_path(step, self._asked)
        if dist.get_rank() == 0:
            try:
                write_answers(path, answers)
            except OSError as error:  # which is no reason to end training
                self._record("evaluation_failed", step=step, reason=f"its answers could not be kept: {error}")
                return
        self._record("answered", step=step, seconds=round(time.perf_counter() - began, 6), answers=str(path))

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @property
    def _is_last(self) -> bool:
        return self._progress.step == self._schedule.num_steps

    def save_if_due(self, decision: Decision, agreed: Agreed) -> None:
        """Save where it is due: no checkpoint is written in a streak of skipped steps, but at the end of the run."""
        step, every = self._progress.step, self._config.checkpoint.snapshot_every_steps
        is_last, is_sound = self._is_last, isinstance(decision, Accept)
        if is_last or (is_sound and (agreed.save or agreed.stop)):
            self._save(durable=True, must=is_last or agreed.stop)
        elif is_sound and every and step % every == 0:
            self._save(durable=False, must=False)

    def _save(self, *, durable: bool, must: bool) -> None:
        self._heartbeat.phase("saving")
        progress = self._progress
        state = stability.after_checkpoint(progress.stability, progress.step)
        is_evaluated = self._evaluated is not None and self._evaluated[0] == progress.step
        facts = Manifest(
            progress.step,
            self._schedule.consumed_samples(progress.step),
            self._config.model_dump(mode="json"),
            data=fingerprints(self._config, self._run_dir.data_for(self._config)),
            data_digest=as_hex(progress.data_digest),
            stability=state.as_tree(),
            heldout_loss=self._evaluated[1] if self._evaluated and is_evaluated else None,
        )
        stall_seconds = self._saver.save(facts, durable=durable, must=must)
        if durable:
            self._agreement.saved(progress.step, stall_seconds)  # one that was left out is not due again at every step
        if stall_seconds is None:
            return
        self._progress = replace(progress, stability=state)
        if durable:
            self._saved_step = progress.step

    def record_stop(self) -> None:
        """The run ends early, as it was asked to."""
        self._record("preempted", reason=self._stop.reason(), step=self._progress.step, saved_step=self._saved_step)

    def roll_back(self, decision: RollBack, place: Step) -> None:
        """Go back to before the streak; no checkpoint is written during one."""
        troubled = self._progress.stability
        source = self._restore()
        self._progress = replace(self._progress, stability=stability.roll_back(self._progress.stability, troubled))
        self._record(
            "rolled_back",
            from_step=place.number,
            to_step=self._progress.step,
            reason=decision.reason,
            quarantined=decision.quarantine,
            checkpoint=source.shown,
        )

    def _restore(self) -> Source:
        self._heartbeat.phase("restoring")
        self._saver.finish()
        source, self._progress = restore(self._engine, self._config, self._run_dir, self._room, self._record)
        self._saved_step = self._progress.step if source.is_own else 0
        self._evaluated = None  # of weights that are not here any more
        self._agreement.saved(self._progress.step)
        return source


def _requests(config: RunConfig, run_dir: RunDir) -> tuple[list[Request], str]:
    """What these ranks are to answer of every checkpoint, and its fingerprint."""
    if config.evaluation.has_service or not config.evaluation.tasks:
        return [], ""
    path = run_dir.requests_path
    asked: list[tuple[list[Request], str]] = [([], "")]
    if dist.get_rank() == 0 and path.exists():
        asked = [(read_requests(path), requests_fingerprint(path))]
    dist.broadcast_object_list(asked, src=0)  # all are to answer the same, whatever they see of a shared folder
    return asked[0]
