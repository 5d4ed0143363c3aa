"""Training speed of one rank beside other loops over the same model: `make bench-train`.

GPT-2 small in bf16 on random tokens: our engine; transformers' GPT2LMHeadModel; a plain PyTorch GPT, eager and
compiled; and the bf16 matrix products of the model's own shapes, which are the limit. Each has a process of its own,
so that none profits from another's settings, and they take turns, so that a machine whose speed drifts slows all of
them; medians and spreads over rounds.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from benchmarks.plain_gpt import PlainGPT, autocast_step
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.plan import model_flops_per_token

Step = Callable[[torch.Tensor], None]


def our_step(config: RunConfig) -> Step:
    from trainer import device, parallel
    from trainer.engine.engine import Engine
    from trainer.pipeline import MicroBatch

    target = device.activate("cpu")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    parallel.initialize(config.parallel, "cpu", f"file://{tempfile.mkdtemp()}/rendezvous", 0, 1)
    engine = Engine(config, target)
    engine.state.reset()

    def step(windows: torch.Tensor) -> None:
        engine.train_step([MicroBatch(part) for part in windows.split(config.train.micro_batch_size)], 1e-4, 0)

    return step


def transformers_step(config: RunConfig) -> Step:
    import transformers

    shape = config.model
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.seq_length,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return autocast_step(model, loss_of, config.train.micro_batch_size)


def plain_step(config: RunConfig) -> Step:
    shape = config.model
    model = PlainGPT(shape.num_layers, shape.hidden_size, shape.num_heads, shape.vocab_size, shape.seq_length)
    return autocast_step(model, model, config.train.micro_batch_size)


def compiled_step(config: RunConfig) -> Step:
    shape = config.model
    model = PlainGPT(shape.num_layers, shape.hidden_size, shape.num_heads, shape.vocab_size, shape.seq_length)
    return autocast_step(model, torch.compile(model), config.train.micro_batch_size)


def matrix_products(config: RunConfig) -> Step:
    """Forward and backward products of every linear layer, and nothing else."""
    model, tokens_at_once = config.model, config.train.micro_batch_size * config.model.seq_length
    h, f = model.hidden_size, model.ffn_size
    layer = [(h, 3 * h), (h, h), (h, f), (f, h)]
    shapes = layer * model.num_layers + [(h, model.vocab_size)]
    inputs = {n: torch.randn(tokens_at_once, n, dtype=torch.bfloat16) for pair in shapes for n in pair}
    weights = {pair: torch.randn(pair, dtype=torch.bfloat16) for pair in shapes}

    def step(windows: torch.Tensor) -> None:
        for _ in range(config.num_microbatches):
            for pair in shapes:
                x, y, weight = inputs[pair[0]], inputs[pair[1]], weights[pair]
                x @ weight  # forward, input gradient, weight gradient
                y @ weight.T
                x.T @ y

    return step


CONTESTANTS: dict[str, Callable[[RunConfig], Step]] = {
    "broadgauge": our_step,
    "transformers": transformers_step,
    "plain eager": plain_step,
    "plain compiled": compiled_step,
    "matrix products": matrix_products,
}


def contestant(name: str, config: RunConfig, threads: int, turns: Connection) -> None:
    """Build, warm up, and then do one step for each word that comes; answers with its (wall, processor) seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = CONTESTANTS[name](config)
    windows = torch.randint(0, config.model.vocab_size, (config.train.global_batch_size, config.model.seq_length + 1))
    for _ in range(2):
        step(windows)
    turns.send("ready")
    while turns.recv():
        wall, processor = time.perf_counter(), time.process_time()
        step(windows)
        turns.send((time.perf_counter() - wall, time.process_time() - processor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--micro-batches", type=int, default=1, help="per step")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    arguments = parser.parse_args()
    config = from_tree(
        {
            "preset": "gpt2_small",
            "model": {"num_layers": arguments.layers, "dropout": 0.0, "vocab_size": 50304},
            "train": {"global_batch_size": 2 * arguments.micro_batches, "micro_batch_size": 2, "precision": "bf16"},
        }
    )
    context = multiprocessing.get_context("spawn")
    turns: dict[str, Connection] = {}
    for name in arguments.only:  # one after the other, so that nobody warms up beside another's compilation
        turns[name], theirs = context.Pipe()
        context.Process(target=contestant, args=(name, config, arguments.threads, theirs), daemon=True).start()
        assert turns[name].recv() == "ready"
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for _ in range(arguments.rounds):
        for name, turn in turns.items():
            turn.send(True)
            seconds[name].append(turn.recv())
    for turn in turns.values():
        turn.send(False)
    report(config, arguments.threads, seconds)


def report(config: RunConfig, threads: int, seconds: dict[str, list[tuple[float, float]]]) -> None:
    model, rounds = config.model, len(next(iter(seconds.values())))
    print(f"{model.num_layers} layers of {model.hidden_size}, {config.num_microbatches} micro-batches of ", end="")
    print(f"{config.train.micro_batch_size} x {model.seq_length}, {threads} threads, {rounds} rounds")
    print(f"{'':17}{'tokens/s':>10}{'min':>8}{'max':>8}{'GFLOP/s':>9}{'cpu s':>8}{'ours / theirs':>15}")
    medians = {name: statistics.median(wall for wall, _ in times) for name, times in seconds.items()}
    for name, times in seconds.items():
        walls = [wall for wall, _ in times]
        rates = [config.tokens_per_step / value for value in (medians[name], max(walls), min(walls))]
        flops = rates[0] * model_flops_per_token(model) / 1e9
        if name == "matrix products":  # which leave attention out
            flops -= rates[0] * 12 * model.num_layers * model.hidden_size * model.seq_length / 1e9
        cpu = statistics.median(processor for _, processor in times)
        ratio = f"{medians[name] / medians['broadgauge']:15.2f}" if "broadgauge" in medians else ""
        print(f"{name:17}{rates[0]:10.0f}{rates[1]:8.0f}{rates[2]:8.0f}{flops:9.0f}{cpu:8.2f}{ratio}")


if __name__ == "__main__":
    main()
