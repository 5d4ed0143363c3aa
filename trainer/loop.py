"""The training loop."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import parallel
from trainer.checkpoint import sharded, store
from trainer.config import RunConfig, UserError
from trainer.data import TrainingData, WindowReader, fingerprints
from trainer.engine import Engine
from trainer.evaluate.heldout import HeldoutEvaluation
from trainer.run_dir import RunDir
from trainer.schedule import learning_rate

Record = Callable[..., None]
"""Appends an event of a kind with its fields; does nothing on ranks that do not write events."""


def train(config: RunConfig, run_dir: RunDir, device: torch.device, record: Record) -> None:
    """Train from the newest checkpoint, or from the seed, to the end of the run, and evaluate before and after."""
    data = run_dir.data_for(config)
    train_reader, heldout_reader = (WindowReader(data / name, config.model.seq_length) for name in ("train", "heldout"))
    samples = TrainingData(train_reader, config)
    evaluation = HeldoutEvaluation(train_reader, heldout_reader, config, device)
    engine = Engine(config, device)

    def evaluate(step: int) -> None:
        record("evaluated", step=step, **asdict(evaluation.run(engine.evaluate)))

    step, is_own = restore(engine, config, run_dir, record)
    if not is_own:
        evaluate(step)
    while step < config.num_steps:
        started = time.perf_counter()
        batch = samples.micro_batches(step * config.train.global_batch_size, parallel.data_rank(), device)
        lr = learning_rate(config, (step + 1) * config.tokens_per_step)
        stats = engine.train_step(batch, lr, step)
        step += 1
        if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            raise FloatingPointError(
                f"step {step} has loss {stats.loss} and gradient norm {stats.grad_norm}: training diverged; the last "
                "checkpoint is from before, continue it with a lower optimizer.lr or a longer optimizer.warmup_tokens"
            )
        record(
            "step",
            step=step,
            tokens=step * config.tokens_per_step,
            loss=stats.loss,
            grad_norm=stats.grad_norm,
            lr=lr,
            seconds=round(time.perf_counter() - started, 6),
        )
        # before saving: a run that is killed in between comes back to before both, and loses neither
        if config.evaluation.every_steps and step % config.evaluation.every_steps == 0 and step < config.num_steps:
            evaluate(step)
        if step % config.checkpoint.every_steps == 0 or step == config.num_steps:
            save(engine, config, run_dir, step, record)
    evaluate(step)


def restore(engine: Engine, config: RunConfig, run_dir: RunDir, record: Record) -> tuple[int, bool]:
    """Load the newest valid checkpoint of this run, else `checkpoint.resume_from`, else start from the seed.

    Returns the number of steps that the state has done, and whether it is from a checkpoint of this run.
    """
    found: list[Path | None] = [None, None]
    if dist.get_rank() == 0:  # one rank decides, so that all load the same
        found = list(find_checkpoint(config, run_dir, record))
    dist.broadcast_object_list(found, src=0)
    own, given = found
    checkpoint = own or given
    if checkpoint is None:
        engine.reset_state()
        step = 0
    else:
        step = sharded.load(engine, checkpoint).step
    record(
        "training_started",
        step=step,
        checkpoint=str(checkpoint) if checkpoint else None,
        threads_per_rank=torch.get_num_threads(),
    )
    return step, own is not None


def find_checkpoint(config: RunConfig, run_dir: RunDir, record: Record) -> tuple[Path | None, Path | None]:
    """The newest valid checkpoint of this run, or else, second, the one that it starts from.

    Raises:
        UserError: the run's data is not what it trained on, or it cannot start from the given checkpoint.
    """
    data = fingerprints(run_dir.data_for(config))
    own = store.newest_valid(run_dir.checkpoints, lambda reason: record("checkpoint_rejected", reason=reason))
    if own is not None:
        trained_on = store.read_manifest(own).data
        if trained_on != data:
            raise UserError(f"{run_dir.data_for(config)} has changed since {own} was written; bring the old data back")
        return own, None
    if not config.checkpoint.resume_from:
        return None, None
    given = store.find(Path(config.checkpoint.resume_from))
    manifest = store.verify(given)
    store.check_continues(manifest, config, given)
    store.check_tokenizer(manifest, data, given)
    return None, given


def save(engine: Engine, config: RunConfig, run_dir: RunDir, step: int, record: Record) -> None:
    """Write a checkpoint and remove those that are no longer kept."""
    started = time.perf_counter()
    manifest = sharded.save(
        engine,
        run_dir.checkpoints,
        step,
        consumed_samples=step * config.train.global_batch_size,
        data=fingerprints(run_dir.data_for(config)),
    )
    if dist.get_rank() == 0:
        store.prune(run_dir.checkpoints, step, config.checkpoint.keep_last)
    record(
        "checkpoint_saved",
        step=step,
        path=str(run_dir.checkpoints / store.folder_name(step)),
        bytes=manifest.num_bytes,
        seconds=round(time.perf_counter() - started, 6),
    )
