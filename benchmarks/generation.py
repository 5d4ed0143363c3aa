"""Speed of generation beside transformers: `make bench-generation`.

The same random weights, as a checkpoint and exported, in fp32; greedy continuations of random prompts, alone and eight
at a time, with a cache on either side. Each side has a process of its own and they take turns, so that a machine whose
speed drifts slows both; medians and spreads over rounds.
"""

import argparse
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

from benchmarks.export import write_checkpoint
from trainer.checkpoint.format import store
from trainer.config import RunConfig
from trainer.config_file import from_tree

Continue = Callable[[list[tuple[int, ...]], int], list[tuple[int, ...]]]

MODELS: dict[str, dict[str, Any]] = {
    "GPT-2 small": {"preset": "gpt2_small"},
    "small": {"model": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "vocab_size": 512, "seq_length": 512}},
}


def ours(config: RunConfig, folder: Path) -> Continue:
    from trainer import device, parallel
    from trainer.inference.answering import answer
    from trainer.inference.cached import CachedModel
    from trainer.inference.requests import Generate, Generated

    target = device.activate("cpu")
    parallel.initialize(config.parallel, "cpu", f"file://{tempfile.mkdtemp()}/rendezvous", 0, 1)
    model = CachedModel(config, folder / "checkpoints" / store.folder_name(1), target)

    def work(prompts: list[tuple[int, ...]], num_tokens: int) -> list[tuple[int, ...]]:
        answers = answer(model, [Generate(prompt, num_tokens) for prompt in prompts])
        return [each.tokens for each in answers if isinstance(each, Generated)]

    return work


def theirs(config: RunConfig, folder: Path) -> Continue:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export").eval()

    def work(prompts: list[tuple[int, ...]], num_tokens: int) -> list[tuple[int, ...]]:
        tokens = torch.tensor(prompts)
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=0,
            eos_token_id=None,
        )
        return [tuple(row[tokens.shape[1] :].tolist()) for row in whole]

    return work


SIDES = {"broadgauge": ours, "transformers": theirs}


def side(name: str, config: RunConfig, folder: Path, threads: int, turns: Connection) -> None:
    """Continue the prompts that come; answers with (seconds, continuations)."""
    torch.set_num_threads(threads)
    work = SIDES[name](config, folder)
    turns.send("ready")
    while (task := turns.recv()) is not None:
        began = time.perf_counter()
        found = work(*task)
        turns.send((time.perf_counter() - began, found))


def write_models(config: RunConfig, folder: Path) -> None:
    from trainer.checkpoint.huggingface import export

    write_checkpoint(config, folder)
    checkpoint, out = folder / "checkpoints" / store.folder_name(1), folder / "export"
    export.commit(export.export_model(checkpoint, config, folder / "tokenizer", out, {}), out)


def compare(title: str, config: RunConfig, folder: Path, arguments: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    turns: dict[str, Connection] = {}
    for name in SIDES:
        turns[name], other = context.Pipe()
        context.Process(target=side, args=(name, config, folder, arguments.threads, other), daemon=True).start()
        assert turns[name].recv() == "ready"
    for batch in arguments.batches:
        draw = torch.Generator().manual_seed(batch)
        prompts = torch.randint(config.model.vocab_size, (batch, arguments.prompt), generator=draw).tolist()
        task = [tuple(prompt) for prompt in prompts], arguments.new_tokens
        seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        for turn in range(arguments.rounds + 1):  # the first warms up
            found = {}
            for name, connection in turns.items():
                connection.send(task)
                elapsed, found[name] = connection.recv()
                seconds[name] += [elapsed] if turn else []
            if found["broadgauge"] != found["transformers"]:
                print("the continuations differ")
        num_tokens = batch * arguments.new_tokens
        for name, each in seconds.items():
            median = num_tokens / statistics.median(each)
            low, high = num_tokens / max(each), num_tokens / min(each)
            print(f"{title}, batch {batch}: {name:13} {median:8.1f} tokens/s ({low:.1f} to {high:.1f})", flush=True)
        ratio = statistics.median(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True))
        print(f"{title}, batch {batch}: {ratio:.2f} times the speed of transformers", flush=True)
    for connection in turns.values():
        connection.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    for title in arguments.only:
        tree = MODELS[title] | {"train": {"precision": "fp32"}}
        with tempfile.TemporaryDirectory(prefix="generation-") as folder:
            config = from_tree(tree)
            write_models(config, Path(folder))
            compare(title, config, Path(folder), arguments)


if __name__ == "__main__":
    main()
