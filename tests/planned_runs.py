"""Small runs in many layouts, measured beside what the planner says of them: peak memory and time of a step."""

import ctypes
import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parity import global_batch
from ranks import run_on_ranks
from trainer import parallel
from trainer.config import RunConfig
from trainer.config_file import override
from trainer.data.batches import MicroBatch
from trainer.engine.engine import Engine

MODEL = {"num_layers": 8, "hidden_size": 384, "num_heads": 6, "vocab_size": 4096, "seq_length": 256}
NO_MODEL = {"hidden_size": 48, "vocab_size": 128, "seq_length": 32}
LLAMA_CLASS: dict[str, Any] = {
    "model.num_kv_heads": 2,
    "model.positions": "rotary",
    "model.norm": "rms",
    "model.activation": "swiglu",
    "model.biases": "none",
    "model.tied_embeddings": False,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32": {"train.precision": "fp32"},
    "micro-batches of 8": {"train.micro_batch_size": 8},
    "selective": {"train.micro_batch_size": 8, "train.recompute": "selective"},
    "full": {"train.micro_batch_size": 8, "train.recompute": "full"},
    "Llama-class": LLAMA_CLASS | {"train.micro_batch_size": 4},
    "TP2": {"parallel.tensor": 2},
    "TP2 SP": {"parallel.tensor": 2, "parallel.sequence": True, "train.micro_batch_size": 4},
    "PP2": {"parallel.pipeline": 2},
    "PP2 interleaved": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
    "CP2": {"parallel.context": 2, "train.micro_batch_size": 4},
    "DP2 ZeRO-1": {"parallel.data": 2},
    "DP2 ZeRO-2": {"parallel.data": 2, "parallel.zero": 2},
    "DP2 ZeRO-3": {"parallel.data": 2, "parallel.zero": 3},
    "DP2 fp32": {"parallel.data": 2, "train.precision": "fp32"},
    "TP2 PP2": {"parallel.tensor": 2, "parallel.pipeline": 2},
    "Llama-class TP2 DP2 ZeRO-2": LLAMA_CLASS | {"parallel.tensor": 2, "parallel.data": 2, "parallel.zero": 2},
}
OTHER_SHAPE: dict[str, Any] = {
    "model.num_layers": 6,
    "model.hidden_size": 512,
    "model.num_heads": 8,
    "model.vocab_size": 8192,
    "model.seq_length": 128,
    "train.global_batch_size": 16,
}
# Of another model, and combinations that no rule of the planner was chosen on.
UNSEEN: dict[str, dict[str, Any]] = {
    "TP2 fp32": {"parallel.tensor": 2, "train.precision": "fp32"},
    "DP2 ZeRO-2 fp32": {"parallel.data": 2, "parallel.zero": 2, "train.precision": "fp32"},
    "DP2 ZeRO-3 fp32": {"parallel.data": 2, "parallel.zero": 3, "train.precision": "fp32"},
    "DP2 ZeRO-3, of 4": {"parallel.data": 2, "parallel.zero": 3, "train.micro_batch_size": 4},
    "PP2 ZeRO-2": {"parallel.pipeline": 2, "parallel.zero": 2},
    "PP2 DP2 ZeRO-3": {"parallel.pipeline": 2, "parallel.data": 2, "parallel.zero": 3},
    "TP2 DP2 ZeRO-3": {"parallel.tensor": 2, "parallel.data": 2, "parallel.zero": 3},
    "Llama-class CP2 ZeRO-2": LLAMA_CLASS | {"parallel.context": 2, "parallel.zero": 2},
    "dropout": {"model.dropout": 0.1, "train.micro_batch_size": 4},
    "DP2 ZeRO-2 full": {
        "parallel.data": 2,
        "parallel.zero": 2,
        "train.micro_batch_size": 8,
        "train.recompute": "full",
    },
}
ALL = LAYOUTS | {name: OTHER_SHAPE | settings for name, settings in UNSEEN.items()}
# constants of malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


@dataclass(frozen=True)
class Measured:
    """Of one rank."""

    before_bytes: int
    """What it held resident before there was an engine."""
    peak_bytes: int
    """What it held at most, from then on."""
    step_seconds: list[float]
    """Of each step."""


def config_of(layout: str) -> RunConfig:
    tree = {
        "model": dict(MODEL),
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "precision": "bf16"},
        "launch": {"device": "cpu", "threads_per_rank": 1},
    }
    return override(tree, [f"{key}={json.dumps(value)}" for key, value in ALL[layout].items()])


def measure(config: RunConfig, num_steps: int, *, returns_memory: bool) -> list[Measured]:
    """Real steps of real ranks; what each rank saw.

    Args:
        returns_memory: have the C library give freed blocks back, so that what is resident is what is in use. Ranks
            keep them for the next step (`trainer.device`), in a heap with holes.
    """

    def on_rank(config: RunConfig, device: torch.device) -> Measured:
        if returns_memory:
            _return_freed_memory()
        gc.collect()
        before = _resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        seconds = _steps(config, device, num_steps)
        return Measured(before, _peak_bytes(), seconds)

    return run_on_ranks(config, on_rank)


def in_use_bytes(config: RunConfig) -> float:
    """At the peak of the rank that needs most, beyond what the same layout takes without a model worth speaking of."""
    return _most_grown(config) - _most_grown(without_model(config))


def without_model(config: RunConfig) -> RunConfig:
    return override(config.model_dump(mode="json"), [f"model.{name}={size}" for name, size in NO_MODEL.items()])


def _most_grown(config: RunConfig) -> float:
    ranks = measure(config, 1, returns_memory=True)
    return max(rank.peak_bytes - rank.before_bytes for rank in ranks)


def resident_bytes(ranks: list[Measured]) -> float:
    """Of the rank that holds most, at the peak."""
    return max(rank.peak_bytes for rank in ranks)


def _steps(config: RunConfig, device: torch.device, num_steps: int) -> list[float]:
    engine = Engine(config, device)
    engine.state.reset()
    micro, replicas, replica = config.train.micro_batch_size, config.parallel.data, parallel.data_rank()
    windows = global_batch(config, 0).view(-1, replicas, micro, config.model.seq_length + 1)[:, replica]
    micro_batches = [MicroBatch(window) for window in windows]
    seconds = []
    for step in range(num_steps):
        start = time.perf_counter()
        engine.train_step(micro_batches, 1e-4, step)
        seconds.append(time.perf_counter() - start)
    return seconds


def _return_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 60_000)
    libc.mallopt(_MMAP_THRESHOLD, 128 << 10)
    libc.mallopt(_TRIM_THRESHOLD, 128 << 10)


def _resident_bytes() -> int:
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text(encoding="ascii").partition(f"{name}:")[2].split()[0])
