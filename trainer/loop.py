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
from trainer.config import RunConfig
from trainer.data import TrainingData, WindowReader
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
        if step % config.checkpoint.every_steps == 0 or step == config.num_steps:
            save(engine, config, run_dir, step, record)
        if config.evaluation.every_steps and step % config.evaluation.every_steps == 0 and step < config.num_steps:
            evaluate(step)
    evaluate(step)


def restore(engine: Engine, config: RunConfig, run_dir: RunDir, record: Record) -> tuple[int, bool]:
    """Load the newest valid checkpoint of this run, else `checkpoint.resume_from`, else start from the seed.

    Returns the number of steps that the state has done, and whether it is from a checkpoint of this run.
    """
    found: list[Path | None] = [None, None]
    if dist.get_rank() == 0:  # one rank decides, so that all load the same
        found[0] = store.newest_valid(run_dir.checkpoints)
        if found[0] is None and config.checkpoint.resume_from:
            other = store.find(Path(config.checkpoint.resume_from))
            store.verify(other)  # as `newest_valid` has done for one of our own
            found[1] = other
    dist.broadcast_object_list(found, src=0)
    own, given = found
    checkpoint = own or given
    if checkpoint is None:
        engine.reset_state()
        step = 0
    else:
        step = sharded.load(engine, checkpoint).step
    record("training_started", step=step, checkpoint=str(checkpoint) if checkpoint else None)
    return step, own is not None


def save(engine: Engine, config: RunConfig, run_dir: RunDir, step: int, record: Record) -> None:
    """Write a checkpoint and remove those that are no longer kept."""
    started = time.perf_counter()
    manifest = sharded.save(engine, run_dir.checkpoints, step, step * config.train.global_batch_size)
    if dist.get_rank() == 0:
        store.prune(run_dir.checkpoints, step, config.checkpoint.keep_last)
    record(
        "checkpoint_saved",
        step=step,
        path=str(run_dir.checkpoints / store.folder_name(step)),
        bytes=manifest.num_bytes,
        seconds=round(time.perf_counter() - started, 6),
    )
