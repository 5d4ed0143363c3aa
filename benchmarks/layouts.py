"""What a layout costs: TP2, PP2 and DP2 on two cores beside one process with two threads: `make bench-layouts`.

GPT-2 small's width, bf16, every layout with the same global batch of 8 sequences. Layouts take turns. Beside tokens/s:
how busy the processors were (CPU seconds over wall seconds of both cores), and how long rank 0 spent in
communication, waiting for others included.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trainer import device, parallel
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.engine.engine import Engine
from trainer.pipeline import MicroBatch

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"tensor": 2},
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "DP2 ZeRO-1": {"data": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
}
CORES = 2


def config_of(layout: str, num_layers: int) -> RunConfig:
    return from_tree(
        {
            "preset": "gpt2_small",
            "model": {"num_layers": num_layers, "seq_length": 512, "dropout": 0.0, "vocab_size": 8192},
            "train": {"global_batch_size": 8, "micro_batch_size": 1, "precision": "bf16"},
            "parallel": LAYOUTS[layout],
        }
    )


def rank_process(layout: str, num_layers: int, rank: int, rendezvous: str, turns: Connection) -> None:
    """One step for each word that comes; answers with (wall, CPU, communication) seconds."""
    config, target = config_of(layout, num_layers), device.activate("cpu")
    size = config.parallel.num_ranks
    torch.set_num_threads(CORES // size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    parallel.initialize(config.parallel, "cpu", rendezvous, rank, size)
    engine = Engine(config, target)
    engine.state.reset()
    windows = torch.randint(0, config.model.vocab_size, (8 // config.parallel.data, config.model.seq_length + 1))
    batch = [MicroBatch(part) for part in windows.split(1)]
    engine.train_step(batch, 1e-4, 0)
    turns.send("ready")
    while turns.recv():
        wall, processor = time.perf_counter(), time.process_time()
        engine.train_step(batch, 1e-4, 0)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        turns.send((wall, processor, communication_seconds(engine, batch)))


def communication_seconds(engine: Engine, batch: list[MicroBatch]) -> float:
    """Of one more step, profiled: what gloo's operations took from their start to their end."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.train_step(batch, 1e-4, 0)
    return sum(event.cpu_time_total for event in profiler.key_averages() if event.key.startswith("gloo:")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    turns: dict[str, list[Connection]] = {}
    for layout in LAYOUTS:
        rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
        turns[layout] = []
        for rank in range(config_of(layout, arguments.layers).parallel.num_ranks):
            ours, theirs = context.Pipe()
            given = (layout, arguments.layers, rank, rendezvous, theirs)
            context.Process(target=rank_process, args=given, daemon=True).start()
            turns[layout].append(ours)
        assert all(turn.recv() == "ready" for turn in turns[layout])
    results: dict[str, list[list[tuple[float, float, float]]]] = {layout: [] for layout in LAYOUTS}
    for _ in range(arguments.rounds):
        for layout, ranks in turns.items():
            for turn in ranks:
                turn.send(True)
            results[layout].append([turn.recv() for turn in ranks])
    for turn in (each for ranks in turns.values() for each in ranks):
        turn.send(False)
    report(arguments.layers, results)


def report(num_layers: int, results: dict[str, list[list[tuple[float, float, float]]]]) -> None:
    tokens = config_of("one process", num_layers).tokens_per_step
    print(f"{num_layers} layers of 768, {tokens} tokens a step, {CORES} cores")
    print(f"{'':17}{'tokens/s':>10}{'min':>8}{'max':>8}{'of one process':>16}{'busy':>7}{'gloo s/step':>13}")
    walls = {layout: [max(wall for wall, _, _ in ranks) for ranks in rounds] for layout, rounds in results.items()}
    base = statistics.median(walls["one process"])
    for layout, rounds in results.items():
        median = statistics.median(walls[layout])
        busy = statistics.median(
            sum(processor for _, processor, _ in ranks) / (CORES * wall)
            for ranks, wall in zip(rounds, walls[layout], strict=True)
        )
        gloo = statistics.median(ranks[0][2] for ranks in rounds)
        rates = (tokens / value for value in (median, max(walls[layout]), min(walls[layout])))
        print(f"{layout:17}{next(rates):10.0f}{next(rates):8.0f}{next(rates):8.0f}", end="")
        print(f"{base / median:16.2f}{busy:7.0%}{gloo:13.2f}")


if __name__ == "__main__":
    main()
