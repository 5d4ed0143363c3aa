"""The record of a run that never was: as many steps as one likes, with all that may happen between them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from trainer.config_file import from_tree
from trainer.events import Event
from trainer.run_dir import RunDir

SEQ_LENGTH, BATCH = 2048, 64
STEP_SECONDS = 1.5
BEGAN = 1_780_000_000.0  # May 2026
NUM_RANKS = 16


def run_of(folder: Path, num_steps: int = 300, name: str = "lion", planned: int | None = None) -> RunDir:
    """The folder of a run that has done so many steps, and is at work."""
    run_dir = RunDir(folder)
    tokens = (planned or num_steps) * BATCH * SEQ_LENGTH
    run_dir.create(
        from_tree(
            {
                "name": name,
                "model": {"seq_length": SEQ_LENGTH},
                "train": {"total_tokens": tokens, "global_batch_size": BATCH},
                "parallel": {"tensor": 2, "data": 8},
            }
        )
    )
    append(run_dir, [*beginning(), *steps(1, num_steps)])
    for rank in range(3):
        lines = "".join(f"step {step} of rank {rank}\n" for step in range(100))
        (run_dir.logs / f"rank-{rank}.log").write_text(lines)
    return run_dir


def append(run_dir: RunDir, events: list[Event]) -> None:
    with open(run_dir.events_path, "ab") as record:
        record.write(b"".join(orjson.dumps(event) + b"\n" for event in events))


def at(step: float) -> float:
    """Unix time."""
    return BEGAN + 10 + STEP_SECONDS * step


def beginning() -> list[Event]:
    source = {"share": 0.7, "epochs": 1.5, "documents": 1000, "tokens": 10**6, "dropped": {"too_short": 12}}
    datasets = {"web": source, "books": {**source, "share": 0.3}}
    return [
        {"time": BEGAN, "kind": "stage_started", "stage": "train"},
        {"time": BEGAN, "kind": "blend", "datasets": datasets},
        {"time": BEGAN + 1, "kind": "life_started", "number": 1, "nodes": 2, "data": 8, "why": "the first life"},
        started(0, BEGAN + 8),
        evaluated(0),
    ]


def started(step: int, time: float) -> Event:
    facts = {"checkpoint": None, "tier": "memory", "ranks": NUM_RANKS, "device": "NVIDIA H100 80GB HBM3"}
    return {"time": time, "kind": "training_started", "step": step, "threads_per_rank": 1, **facts}


def evaluated(step: int) -> Event:
    loss = loss_at(step) + 0.05
    losses = {"loss": loss, "uniform_loss": 10.8, "unigram_loss": 7.5, "bits_per_byte": loss / 3}
    datasets = {
        name: {"loss": loss + more, "tokens": 5 * 10**4, "bits_per_byte": (loss + more) / 3}
        for name, more in (("web", 0.2), ("books", -0.2))
    }
    measured = {"time": at(step) + 0.1, "kind": "evaluated", "step": step, "tokens": 10**5}
    return {**measured, **losses, "datasets": datasets}


def judged(step: int) -> Event:
    scores = {"arithmetic/0-shot/accuracy": step / 10**6, "arithmetic/8-shot/accuracy": 2 * step / 10**6}
    facts = {"results": f"checkpoints/step-{step:08d}.results.json", "seconds": 3.5, "heldout_loss": loss_at(step)}
    return {"time": at(step) + 0.15, "kind": "checkpoint_evaluated", "step": step, **facts, "scores": scores}


def loss_at(step: int) -> float:
    return 2.4 + 8.4 / (1 + step / 40) ** 0.6 + 0.05 * math.sin(step * 12.9898)


def steps(first: int, last: int) -> Iterator[Event]:
    """With evaluations, checkpoints, looks at ranks (rank 5 becomes slow), and one failure every 5,000 steps."""
    for step in range(first, last + 1):
        yield step_event(step)
        if step % 100 == 0:
            yield evaluated(step)
            yield judged(step)
        if step % 50 == 0:
            saved = {"step": step, "path": f"checkpoints/step-{step:08d}", "bytes": 3 * 10**9, "seconds": 1.25}
            yield {"time": at(step) + 0.2, "kind": "checkpoint_snapshot", "step": step, "durable": True, "seconds": 0.1}
            yield {"time": at(step) + 1.4, "kind": "checkpoint_saved", **saved}
        if step % 10 == 0:
            yield ranks_event(step)
        if step % 5000 == 120:
            yield from failure(step)


def failure(step: int) -> list[Event]:
    error = "rank 3 was killed by SIGKILL; see logs/rank-3.log"
    return [
        {"time": at(step) + 0.3, "kind": "life_failed", "what": "rank", "error": error, "machine": "a", "step": step},
        {"time": at(step) + 0.4, "kind": "life_started", "number": 2, "nodes": 2, "data": 8, "why": error},
        started(step, at(step) + 1.0),
    ]


def step_event(step: int, **changes: Any) -> Event:
    seconds = STEP_SECONDS - 0.1 + 0.05 * math.sin(step)
    shares = {"loading data": 0.02, "computing": 0.78, "reducing gradients": 0.12, "updating": 0.05, "agreeing": 0.03}
    phases = {phase: round(share * seconds, 6) for phase, share in shares.items()}
    facts = {"tokens": step * BATCH * SEQ_LENGTH, "first_sample": (step - 1) * BATCH, "num_samples": BATCH}
    rest = {"tokens_xxh3": "0", "lr": 6e-4, "grad_norm": 1 + 1 / step, "seconds": seconds, "phases": phases}
    event = {"time": at(step), "kind": "step", "step": step, "loss": loss_at(step), **facts, **rest}
    return event | changes


def ranks_event(step: int) -> Event:
    own = [0.9 + 0.02 * math.sin(rank + step) for rank in range(NUM_RANKS)]
    own[5] *= 1 + min(0.8, step / 400)
    told = {"min": min(own), "mean": sum(own) / len(own), "max": max(own), "slowest": own.index(max(own))}
    return {"time": at(step) + 0.05, "kind": "ranks", "step": step, "seconds": own, "group": 1, **told}
