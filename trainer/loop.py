"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import parallel, stability
from trainer.checkpoint import compatibility, saving, sharded, store
from trainer.checkpoint.manifest import Manifest, read_manifest
from trainer.config import RunConfig
from trainer.data.batches import ReadAhead, TrainingData
from trainer.data.prepared import PreparedFolder, fingerprints
from trainer.data.windows import HeldoutReader
from trainer.engine.engine import Engine
from trainer.evaluate.heldout import HeldoutEvaluation
from trainer.run_dir import RunDir
from trainer.schedule import Schedule, Step, learning_rate
from trainer.stability import Accept, Decision, RollBack, Skip, StabilityState, Stop, TrainingDiverged

Record = Callable[..., None]
"""Appends an event of a kind with its fields; does nothing on ranks that do not write events."""


def train(config: RunConfig, run_dir: RunDir, device: torch.device, record: Record) -> None:
    """Train from the newest checkpoint, or from the seed, to the end of the run, and evaluate before and after.

    Raises:
        TrainingDiverged: neither skipping steps nor going back to a checkpoint has helped.
    """
    data = PreparedFolder.open(run_dir.data_for(config))
    samples = TrainingData.open(data, config)
    evaluation = HeldoutEvaluation(samples, HeldoutReader(data, config.model.seq_length), config, device)
    schedule = Schedule(config)
    engine = Engine(config, device)

    def read(step: int) -> torch.Tensor:
        place = schedule.step_after(step)
        return samples.replica_tokens(place.first_sample, place.batch_size, parallel.data_rank())

    def evaluate(step: int) -> None:
        record("evaluated", step=step, **asdict(evaluation.run(engine.evaluate)))

    step, state, is_own = restore(engine, config, run_dir, record)
    saved_at, every = step, config.checkpoint.interval_steps or 1
    if not is_own:
        evaluate(step)
    with ReadAhead(read, schedule.num_steps, config.train.micro_batch_size, device) as batches:
        while step < schedule.num_steps:
            place, is_last = schedule.step_after(step), step + 1 == schedule.num_steps
            if place.number in state.quarantined:
                decision, state = pass_over(place, state, record)
            else:
                decision, state = take_step(engine, config, place, batches, state, record)
            if isinstance(decision, RollBack):
                step, state = roll_back(engine, config, run_dir, decision, step + 1, state, record)
                saved_at = step
                continue
            step += 1
            # before saving: a run that is killed in between comes back to before both, and loses neither
            if config.evaluation.every_steps and step % config.evaluation.every_steps == 0 and not is_last:
                evaluate(step)
            is_due = step // every > saved_at // every
            if is_last or (is_due and isinstance(decision, Accept)):
                state = save(engine, config, run_dir, step, state, record)
                saved_at = step
    evaluate(step)


def take_step(
    engine: Engine,
    config: RunConfig,
    place: Step,
    batches: ReadAhead,
    state: StabilityState,
    record: Record,
) -> tuple[Decision, StabilityState]:
    """Compute a step, and update the weights if it is sound.

    Raises:
        TrainingDiverged: see `train`.
    """
    started = time.perf_counter()
    batch = batches.micro_batches(place.number - 1)
    lr = learning_rate(config, place.tokens_after)

    def is_sound(loss: float, grad_norm: float) -> bool:
        return stability.fault(config.stability, state, loss, grad_norm) is None

    stats = engine.train_step(batch, lr, place.number - 1, is_sound)
    decision, state = stability.judge(config.stability, state, place.number, stats.loss, stats.grad_norm)
    assert stats.updated == isinstance(decision, Accept)
    if isinstance(decision, Accept):
        record(
            "step",
            step=place.number,
            tokens=place.tokens_after,
            loss=stats.loss,
            grad_norm=stats.grad_norm,
            lr=lr,
            seconds=round(time.perf_counter() - started, 6),
        )
    else:
        record_skip(record, place, decision.reason, stats.loss, stats.grad_norm)
    if isinstance(decision, Stop):
        record("diverged", verdict=decision.verdict)
        dist.barrier()  # once a rank has raised, the others are killed: not before it is recorded
        raise TrainingDiverged(decision.verdict)
    return decision, state


def pass_over(place: Step, state: StabilityState, record: Record) -> tuple[Decision, StabilityState]:
    """Consume the samples of a quarantined step."""
    record_skip(record, place, "quarantined", None, None)
    return Skip("quarantined"), stability.pass_over(state, place.number)


def record_skip(record: Record, place: Step, reason: str, loss: float | None, grad_norm: float | None) -> None:
    record(
        "step_skipped",
        step=place.number,
        first_sample=place.first_sample,
        num_samples=place.batch_size,
        reason=reason,
        loss=loss,
        grad_norm=grad_norm,
    )


# --------------------------------------------------------------------------------------------------------- checkpoints


def restore(engine: Engine, config: RunConfig, run_dir: RunDir, record: Record) -> tuple[int, StabilityState, bool]:
    """Load the newest valid checkpoint of this run, else `checkpoint.resume_from`, else start from the seed.

    Returns the number of steps done, the policy's state then, and whether they are from a checkpoint of this run.
    """
    checkpoint, is_own = agree_on_checkpoint(config, run_dir, record)
    step, state = load(engine, checkpoint)
    record(
        "training_started",
        step=step,
        checkpoint=str(checkpoint) if checkpoint else None,
        threads_per_rank=torch.get_num_threads(),
    )
    return step, state, is_own


def roll_back(
    engine: Engine,
    config: RunConfig,
    run_dir: RunDir,
    decision: RollBack,
    from_step: int,
    troubled: StabilityState,
    record: Record,
) -> tuple[int, StabilityState]:
    """Load what `restore` would, which is from before the streak: none is written during one."""
    checkpoint, _ = agree_on_checkpoint(config, run_dir, record)
    step, restored = load(engine, checkpoint)
    record(
        "rolled_back",
        from_step=from_step,
        to_step=step,
        reason=decision.reason,
        quarantined=decision.quarantine,
        checkpoint=str(checkpoint) if checkpoint else None,
    )
    return step, stability.roll_back(restored, troubled)


def load(engine: Engine, checkpoint: Path | None) -> tuple[int, StabilityState]:
    """Fill the engine from a checkpoint, or from the seed."""
    if checkpoint is None:
        engine.state.reset()
        return 0, StabilityState()
    manifest = sharded.load(engine, checkpoint)
    return manifest.step, StabilityState.from_tree(manifest.stability)


def agree_on_checkpoint(config: RunConfig, run_dir: RunDir, record: Record) -> tuple[Path | None, bool]:
    """The checkpoint to begin from, if there is one, and whether it is this run's own; collective.

    Raises:
        UserError: see `find_checkpoint`.
    """
    found: list[Path | None] = [None, None]
    if dist.get_rank() == 0:  # one rank decides, so that all load the same
        found = list(find_checkpoint(config, run_dir, record))
    dist.broadcast_object_list(found, src=0)
    own, given = found
    return own or given, own is not None


def find_checkpoint(config: RunConfig, run_dir: RunDir, record: Record) -> tuple[Path | None, Path | None]:
    """The newest valid checkpoint of this run, or else, second, the one that it starts from.

    Raises:
        UserError: the run's data is not what it trained on, or it cannot start from the given checkpoint.
    """
    data = fingerprints(config, run_dir.data_for(config))
    own = store.newest_valid(run_dir.checkpoints, lambda reason: record("checkpoint_rejected", reason=reason))
    if own is not None:
        compatibility.check_same_data(read_manifest(own), data, run_dir.data_for(config), own)
        return own, None
    if not config.checkpoint.resume_from:
        return None, None
    given = store.find(Path(config.checkpoint.resume_from))
    manifest = store.verify(given)
    compatibility.check_continues(manifest, config, given)
    compatibility.check_tokenizer(manifest, data, given)
    return None, given


def save(
    engine: Engine, config: RunConfig, run_dir: RunDir, step: int, state: StabilityState, record: Record
) -> StabilityState:
    """Write a checkpoint and remove those that are no longer kept; returns the policy's state from then on."""
    started = time.perf_counter()
    state = stability.after_checkpoint(state, step)
    facts = Manifest(
        step,
        Schedule(config).consumed_samples(step),
        config.model_dump(mode="json"),
        data=fingerprints(config, run_dir.data_for(config)),
        stability=state.as_tree(),
    )
    manifest = saving.save(engine, run_dir.checkpoints, facts)
    record(
        "checkpoint_saved",
        step=step,
        path=str(run_dir.checkpoints / store.folder_name(step)),
        bytes=manifest.num_bytes,
        seconds=round(time.perf_counter() - started, 6),
    )
    return state
