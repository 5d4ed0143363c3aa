"""Banded attention beside dense, and context parallelism's memory: `make bench-attention`.

1. Attention of GPT-2 small's shape (12 heads of 64, bf16, one sequence), forward and backward: a banded one against
   a dense one, the same inputs, taking turns; alone, and as a whole transformer layer with its matrices.
2. Peak memory of a banded one, in a process of its own for every length: how it grows.
3. A Llama-class model on sequences of 32,768 tokens, one step, over 1, 2 and 4 context-parallel ranks: the most
   memory that a rank held beyond its state before the step.
"""

import argparse
import ctypes
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from trainer import device, parallel
from trainer.config_file import from_tree
from trainer.engine.engine import Engine
from trainer.model.attention import attend
from trainer.model.gpt import build_chunks
from trainer.pipeline import MicroBatch

HEADS, HEAD_SIZE = 12, 64
WINDOW = 256


def attention_pass(seq_length: int, window: int | None) -> Callable[[], None]:
    shape = (1, HEADS, seq_length, HEAD_SIZE)
    query, key, value, gradient = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    return lambda: torch.autograd.backward(attend(*inputs, window), gradient)


def layer_passes(seq_length: int) -> list[Callable[[], None]]:
    """A dense and a banded transformer layer of one model, forward and backward."""
    shape = {"num_layers": 2, "num_heads": HEADS, "hidden_size": HEADS * HEAD_SIZE, "seq_length": seq_length}
    config = from_tree({"model": shape | {"attention_window": WINDOW}, "train": {"precision": "bf16"}})
    _one_rank(config)
    (chunk,) = build_chunks(config)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    hidden = torch.randn(seq_length, 1, HEADS * HEAD_SIZE, dtype=torch.bfloat16, requires_grad=True)

    def layer_pass(layer: torch.nn.Module) -> Callable[[], None]:
        return lambda: layer(hidden, attention_mask=None)[0].sum().backward()

    return [layer_pass(layer) for layer in chunk.decoder.layers]


def compare_speed(seq_length: int, rounds: int) -> None:
    contests = {
        "attention alone": [attention_pass(seq_length, None), attention_pass(seq_length, WINDOW)],
        "whole layer": layer_passes(seq_length),
    }
    print(f"forward and backward, {seq_length:,} tokens, window {WINDOW}, {torch.get_num_threads()} threads")
    print(f"{'':18}{'dense s':>9}{'banded s':>10}{'ratio':>7}{'min':>6}{'max':>6}")
    for name, passes in contests.items():
        times: list[list[float]] = [[], []]
        for round_number in range(rounds + 1):
            for which, run in enumerate(passes):
                started = time.perf_counter()
                run()
                if round_number:  # the first round warms up
                    times[which].append(time.perf_counter() - started)
        ratios = [dense / banded for dense, banded in zip(*times, strict=True)]
        dense, banded = (statistics.median(each) for each in times)
        print(f"{name:18}{dense:9.2f}{banded:10.3f}{dense / banded:7.1f}{min(ratios):6.1f}{max(ratios):6.1f}")


def banded_memory(seq_length: int, answer: Connection) -> None:
    device.activate("cpu")
    run = attention_pass(seq_length, WINDOW)
    answer.send(_peak_bytes_of(run))


def context_memory(config_tree: dict[str, Any], rank: int, rendezvous: str, answer: Connection) -> None:
    config = from_tree(config_tree)
    target = device.activate("cpu")
    torch.set_num_threads(1)
    size = config.parallel.num_ranks
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    parallel.initialize(config.parallel, "cpu", rendezvous, rank, size)
    engine = Engine(config, target)
    engine.state.reset()
    windows = torch.zeros(1, config.model.seq_length + 1, dtype=torch.long)
    answer.send(_peak_bytes_of(lambda: engine.train_step([MicroBatch(windows)], 1e-4, 0)))


def _peak_bytes_of(run: Callable[[], object]) -> int:
    """The most resident memory while it runs, beyond that before."""
    ctypes.CDLL(None).malloc_trim(0)  # give back what is free, or it would be used without being seen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def _one_rank(config: Any) -> None:
    device.activate("cpu")
    parallel.initialize(config.parallel, "cpu", f"file://{tempfile.mkdtemp()}/rendezvous", 0, 1)


def _in_processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in arguments]
    processes = [
        context.Process(target=target, args=(*each, theirs)) for each, (_, theirs) in zip(arguments, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    answers = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context-seq-length", type=int, default=32768)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if not arguments.skip_speed:
        compare_speed(8192, arguments.rounds)
    print("\npeak memory of banded attention, forward and backward")
    for seq_length in (2048, 4096, 8192, 16384):
        (peak,) = _in_processes(banded_memory, [(seq_length,)])
        print(f"{seq_length:8,} tokens {peak / 1e6:8.1f} MB {peak / seq_length:8.0f} bytes a token")
    length = arguments.context_seq_length
    print(f"\npeak memory of a rank in one step, Llama-class, {length:,} tokens, full recomputation")
    for context in (1, 2, 4):
        tree = {
            "model": {
                "num_layers": 2,
                "hidden_size": 256,
                "num_heads": 4,
                "vocab_size": 4096,
                "seq_length": length,
                "positions": "rotary",
                "norm": "rms",
                "activation": "swiglu",
                "biases": "none",
                "tied_embeddings": False,
            },
            "train": {"global_batch_size": 1, "precision": "bf16", "recompute": "full"},
            "parallel": {"context": context},
        }
        rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
        peaks = _in_processes(context_memory, [(tree, rank, rendezvous) for rank in range(context)])
        print(f"context {context}: {max(peaks) / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
