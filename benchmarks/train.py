"""Training speed of one rank beside two other loops over the same model: `make bench-train`.

GPT-2 small's shape with fewer layers, bf16, the same random tokens: our engine; a plain loop over transformers'
GPT2LMHeadModel; and the bf16 matrix products of the model's own shapes, which are the limit. The three take turns
in one process, so that a machine whose speed drifts slows all of them; medians and spreads over rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import transformers

from trainer import device, parallel
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.engine import Engine
from trainer.pipeline import MicroBatch
from trainer.plan import model_flops_per_token


def our_step(config: RunConfig) -> Callable[[torch.Tensor], None]:
    target = device.activate("cpu")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    rendezvous = tempfile.mkdtemp()
    parallel.initialize(config.parallel, "cpu", f"file://{rendezvous}/rendezvous", 0, 1)
    engine = Engine(config, target)
    engine.reset_state()

    def step(tokens: torch.Tensor) -> None:
        engine.train_step([MicroBatch(part) for part in tokens.split(config.train.micro_batch_size)], 1e-4, 0)

    return step


def transformers_step(config: RunConfig) -> Callable[[torch.Tensor], None]:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.model.vocab_size,
            n_positions=config.model.seq_length,
            n_embd=config.model.hidden_size,
            n_layer=config.model.num_layers,
            n_head=config.model.num_heads,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: torch.Tensor) -> None:
        parts = tokens.split(config.train.micro_batch_size)
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=part[:, :-1]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_products(config: RunConfig) -> Callable[[torch.Tensor], None]:
    """Forward and backward products of every linear layer, and nothing else."""
    model, tokens_at_once = config.model, config.train.micro_batch_size * config.model.seq_length
    h, f = model.hidden_size, model.ffn_size
    layer = [(h, 3 * h), (h, h), (h, f), (f, h)]
    shapes = layer * model.num_layers + [(h, model.vocab_size)]
    inputs = {n: torch.randn(tokens_at_once, n, dtype=torch.bfloat16) for pair in shapes for n in pair}
    weights = {pair: torch.randn(pair, dtype=torch.bfloat16) for pair in shapes}

    def step(tokens: torch.Tensor) -> None:
        for _ in range(config.num_microbatches):
            for pair in shapes:
                x, y, weight = inputs[pair[0]], inputs[pair[1]], weights[pair]
                x @ weight  # forward, input gradient, weight gradient
                y @ weight.T
                x.T @ y

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = from_tree(
        {
            "preset": "gpt2_small",
            "model": {"num_layers": arguments.layers, "dropout": 0.0, "vocab_size": 50304},
            "train": {"global_batch_size": 2, "micro_batch_size": 2, "precision": "bf16"},
        }
    )
    steps = {
        "broadgauge": our_step(config),
        "transformers": transformers_step(config),
        "matrix products": matrix_products(config),
    }
    tokens = torch.randint(0, config.model.vocab_size, (config.train.global_batch_size, config.model.seq_length + 1))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(arguments.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step(tokens)
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    shape = f"{arguments.layers} layers of {config.model.hidden_size}"
    print(f"{shape}, {arguments.threads} threads, {arguments.rounds} rounds")
    print(f"{'':17}{'tokens/s':>10}{'min':>8}{'max':>8}{'GFLOP/s':>9}{'ratio to ours':>15}")
    ours = statistics.median(seconds["broadgauge"])
    for name, times in seconds.items():
        median = statistics.median(times)
        rates = [config.tokens_per_step / value for value in (median, max(times), min(times))]
        flops = rates[0] * model_flops_per_token(config.model) / 1e9
        print(f"{name:17}{rates[0]:10.0f}{rates[1]:8.0f}{rates[2]:8.0f}{flops:9.0f}{ours / median:15.2f}")


if __name__ == "__main__":
    main()
