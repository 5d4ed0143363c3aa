"""Parity: what a parallel layout computes against a plain one-process PyTorch GPT.

`compare` trains both on the same data from the same weights and returns the largest differences in loss, gradient norm
(clipping is active) and weights. `python tests/parity.py` prints the table of all cases.
"""

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from ranks import run_on_ranks
from reference_gpt import ReferenceGPT
from reference_gpt import train as train_reference
from trainer import parallel
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.engine import Engine
from trainer.model.init import initial_values
from trainer.model.sharding import Box
from trainer.pipeline import MicroBatch
from trainer.schedule import learning_rate
from trainer.training_state import MASTER

NUM_STEPS = 10
# Largest relative differences allowed. bf16's rounding moves tensors that start at zero (biases) by some percent.
TOLERANCES = {
    "fp32": {"loss": 2e-6, "grad_norm": 2e-6, "weights": 2e-6},
    "bf16": {"loss": 1e-3, "grad_norm": 1e-3, "weights": 5e-2},
}
# Adam divides by the root of the second moment plus eps. Some gradients are zero but for rounding (a key's bias moves
# all scores of a query alike), and with the papers' 1e-8 Adam would blow that rounding up to whole steps.
EPS = 1e-5
LEARNING_RATE = 2e-4  # at 1e-3 these ten steps are chaotic enough to amplify bf16's rounding tenfold

CASES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "TP4": {"tensor": 4},
    "TP2 SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP4": {"pipeline": 4},
    "PP2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2 ZeRO-1": {"data": 2},
    "DP2 ZeRO-2": {"data": 2, "zero": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2 SP x DP2 ZeRO-2": {"tensor": 2, "sequence": True, "data": 2, "zero": 2},
    "TP2 SP x DP2 ZeRO-3": {"tensor": 2, "sequence": True, "data": 2, "zero": 3},
    "PP2 x DP2 interleaved": {"pipeline": 2, "data": 2, "virtual_pipeline": 2},
    "TP2 x PP2 x DP2": {"tensor": 2, "pipeline": 2, "data": 2},
    "TP2 SP x PP2 x DP2 interleaved": {
        "tensor": 2,
        "sequence": True,
        "pipeline": 2,
        "data": 2,
        "virtual_pipeline": 2,
    },
    "PP2 x DP2 ZeRO-2 untied": {"pipeline": 2, "data": 2, "zero": 2, "model": {"tied_embeddings": False}},
    "TP2 x PP2 post-norm": {"tensor": 2, "pipeline": 2, "model": {"norm_placement": "post"}},
    "TP2 x PP2 recompute": {"tensor": 2, "pipeline": 2, "train": {"recompute": "full"}},
}


@dataclass(frozen=True)
class Difference:
    """Relative; the largest over all steps, and over all tensors (in L2 norm) for the weights after the last."""

    loss: float
    grad_norm: float
    weights: float

    def within(self, precision: str) -> bool:
        return all(getattr(self, name) <= bound for name, bound in TOLERANCES[precision].items())


def config_of(case: str, precision: str) -> RunConfig:
    layout = dict(CASES[case])
    model, train = layout.pop("model", {}), layout.pop("train", {})
    return from_tree(
        {
            # 120 tokens pad to 128 rows, so the padding mask is part of what is compared
            "model": {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "vocab_size": 120, "seq_length": 32, **model},
            "train": {"global_batch_size": 16, "micro_batch_size": 2, "precision": precision, **train},
            "optimizer": {"lr": LEARNING_RATE, "clip_grad_norm": 0.5, "weight_decay": 0.1, "eps": EPS},
            "parallel": layout,
        }
    )


def global_batch(config: RunConfig, step: int) -> torch.Tensor:
    """Sequences of one step [global batch, s + 1]: arithmetic progressions with noise, so there is structure."""
    generator = torch.Generator().manual_seed(77_000 + step)
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    start = torch.randint(0, config.model.vocab_size, (shape[0], 1), generator=generator)
    stride = torch.randint(1, 7, (shape[0], 1), generator=generator)
    progression = (start + stride * torch.arange(shape[1])) % config.model.vocab_size
    noise = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.1, noise, progression)


def learning_rates(config: RunConfig) -> list[float]:
    return [learning_rate(config, (step + 1) * config.tokens_per_step) for step in range(NUM_STEPS)]


def initial_weights(config: RunConfig, model: ReferenceGPT) -> dict[str, torch.Tensor]:
    """What the product starts from, as whole tensors."""
    return {
        name: initial_values(
            Box(name, tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape), 0), config.model, config.seed
        )
        for name, tensor in model.global_tensors().items()
    }


def run_reference(config: RunConfig) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    model = ReferenceGPT(
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        num_heads=config.model.num_heads,
        ffn_hidden_size=config.model.ffn_size,
        vocab_size=config.model.vocab_size,
        padded_vocab_size=config.model.padded_vocab_size,
        seq_length=config.model.seq_length,
        norm_placement=config.model.norm_placement,
        tied_embeddings=config.model.tied_embeddings,
    )
    model.load_global(initial_weights(config, model))
    micro = config.train.micro_batch_size
    history = train_reference(
        model,
        [global_batch(config, step).split(micro) for step in range(NUM_STEPS)],
        lrs=learning_rates(config),
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip=config.optimizer.clip_grad_norm,
        precision=config.train.precision,
    )
    return history, model.global_tensors()


def train_rank(config: RunConfig, device: torch.device) -> tuple[list[tuple[float, float]], list[Any]]:
    """One rank's run: (loss, grad norm) of each step, and the blocks of the final weights that it owns."""
    engine = Engine(config, device)
    engine.reset_state()
    micro, replicas, replica = config.train.micro_batch_size, parallel.data_size(), parallel.data_rank()
    history = []
    for step, lr in enumerate(learning_rates(config)):
        mine = global_batch(config, step).view(-1, replicas, micro, config.model.seq_length + 1)[:, replica]
        stats = engine.train_step([MicroBatch(tokens) for tokens in mine], lr, step)
        history.append((stats.loss, stats.grad_norm))
    blocks = [(f.box, f.tensors[MASTER].clone()) for f in engine.fragments() if f.is_main]
    return history, blocks


def assemble(per_rank: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's blocks; asserts that the blocks cover each exactly once."""
    whole: dict[str, torch.Tensor] = {}
    covered: dict[str, int] = {}
    for box, values in (block for blocks in per_rank for block in blocks):
        tensor = whole.setdefault(box.key, torch.full(box.global_shape, math.nan))
        tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = values
        covered[box.key] = covered.get(box.key, 0) + box.numel
    assert {key: tensor.numel() for key, tensor in whole.items()} == covered
    return whole


def _relative_distance(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    return ((tensor - reference).norm() / reference.norm()).item()


def compare(case: str, precision: str) -> Difference:
    config = config_of(case, precision)
    reference_history, reference_weights = run_reference(config)
    results = run_on_ranks(config, train_rank)
    assert all(history == results[0][0] for history, _ in results), "ranks disagree about loss or gradient norm"
    history, weights = results[0][0], assemble([blocks for _, blocks in results])
    assert weights.keys() == reference_weights.keys(), weights.keys() ^ reference_weights.keys()
    return Difference(
        loss=max(abs(a - b) / b for (a, _), (b, _) in zip(history, reference_history, strict=True)),
        grad_norm=max(abs(a - b) / b for (_, a), (_, b) in zip(history, reference_history, strict=True)),
        weights=max(_relative_distance(weights[key], reference) for key, reference in reference_weights.items()),
    )


def main() -> int:
    torch.set_num_threads(1)
    print(f"{'layout':34}{'precision':>10}{'loss':>10}{'grad norm':>11}{'weights':>10}{'seconds':>9}")
    failures = 0
    for case in CASES:
        for precision in TOLERANCES:
            started = time.perf_counter()
            difference = compare(case, precision)
            verdict = "" if difference.within(precision) else "  TOO FAR"
            failures += bool(verdict)
            print(
                f"{case:34}{precision:>10}{difference.loss:10.1e}{difference.grad_norm:11.1e}{difference.weights:10.1e}"
                f"{time.perf_counter() - started:9.1f}{verdict}",
                flush=True,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
