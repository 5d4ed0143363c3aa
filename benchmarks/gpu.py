"""Training speed of GPT-3 shapes on one GPU: `python -m benchmarks.gpu`.

bf16, sequences of 2,048, ZeRO 1 on one rank, the largest micro-batch and the least recomputation that the plan says
fit. Prints tokens/s, model FLOPs utilisation against the dense bf16 peak, and memory, planned and measured. Published
beside it: 46.4 % for a 7B model on H100 (llm-foundry, sequence 2,048), 41-49 % on H100 (Megatron-Core r0.8, 4,096).
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection

import torch

from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.hardware import peak_flops
from trainer.plan import (
    activation_bytes_per_microbatch,
    hardware_flops_per_token,
    model_flops_per_token,
    num_parameters,
    state_bytes_per_rank,
)

PRESETS = ("gpt3_xl", "gpt3_2_7b", "gpt3_6_7b")
SEQUENCES_PER_STEP = 32
USABLE_MEMORY = 0.92  # the rest is for what the plan leaves out: temporaries, fragmentation, the CUDA context


def config_of(preset: str, window: int | None, micro_batch_size: int, recompute: str) -> RunConfig:
    return from_tree(
        {
            "preset": preset,
            "model": {"attention_window": window, "biases": "all"},
            "train": {
                "global_batch_size": SEQUENCES_PER_STEP,
                "micro_batch_size": micro_batch_size,
                "precision": "bf16",
                "recompute": recompute,
            },
            "launch": {"device": "cuda"},
        }
    )


def planned_bytes(config: RunConfig) -> int:
    return state_bytes_per_rank(config).total + activation_bytes_per_microbatch(config)


def fitting_config(preset: str, window: int | None, memory_bytes: int) -> RunConfig | None:
    """Least recomputation first, then the largest micro-batch; micro-batches below 4 only when all is recomputed."""
    for recompute, sizes in (("none", (16, 8, 4)), ("selective", (16, 8, 4)), ("full", (16, 8, 4, 2, 1))):
        for micro_batch_size in sizes:
            config = config_of(preset, window, micro_batch_size, recompute)
            if planned_bytes(config) <= USABLE_MEMORY * memory_bytes:
                return config
    return None


def measure(config: RunConfig, num_steps: int, answer: Connection) -> None:
    """Seconds of each step after three to warm up, and the most memory that was allocated."""
    from trainer import device, parallel
    from trainer.engine.engine import Engine
    from trainer.pipeline import MicroBatch

    target = device.activate("cuda")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    parallel.initialize(config.parallel, "cuda", f"file://{tempfile.mkdtemp()}/rendezvous", 0, 1)
    engine = Engine(config, target)
    engine.state.reset()
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    windows = torch.randint(0, config.model.vocab_size, shape, device=target)
    batch = [MicroBatch(part) for part in windows.split(config.train.micro_batch_size)]
    seconds = []
    for step in range(num_steps + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.train_step(batch, 1e-4, step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    answer.send((seconds[3:], torch.cuda.max_memory_allocated()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--window", type=int, help="every second layer banded so wide; dense without it")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak, where the GPU is not known here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and there is none")
        return 2
    name, memory_bytes = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else peak_flops(name)
    if peak is None:
        print(f"the bf16 peak of {name} is not known here; give --peak-tflops")
        return 2
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, peak {peak / 1e12} TFLOP/s")
    print(f"{'':12}{'params':>8}{'micro':>7}{'recompute':>11}{'tokens/s':>10}{'spread':>8}", end="")
    print(f"{'MFU':>7}{'HFU':>7}{'GB':>7}{'planned':>9}")
    context = multiprocessing.get_context("spawn")
    for preset in arguments.presets:
        config = fitting_config(preset, arguments.window, memory_bytes)
        if config is None:
            print(f"{preset:12} does not fit {memory_bytes / 1e9:.0f} GB by the plan")
            continue
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(config, arguments.steps, theirs))
        process.start()
        theirs.close()
        try:
            seconds, peak_bytes = ours.recv()
        except EOFError:
            print(f"{preset:12} failed (see above)")
            continue
        finally:
            process.join()
        rate = config.train.global_batch_size * config.model.seq_length / statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
        mfu = rate * model_flops_per_token(config.model) / peak
        hfu = rate * hardware_flops_per_token(config) / peak
        print(f"{preset:12}{num_parameters(config.model) / 1e9:7.2f}B{config.train.micro_batch_size:7}", end="")
        print(f"{config.train.recompute:>11}{rate:10,.0f}{spread:8.1%}{mfu:7.1%}{hfu:7.1%}", end="")
        print(f"{peak_bytes / 1e9:7.1f}{planned_bytes(config) / 1e9:9.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
