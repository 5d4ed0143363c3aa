"""Parity: what a parallel layout computes against a plain one-process PyTorch GPT.

`compare` trains both on the same data from the same weights and returns the largest differences in loss, gradient norm
(clipping is active) and weights; in ten steps unless it is told how many. `python tests/parity.py` prints the table of
all cases.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any

import torch

from ranks import run_on_ranks
from reference_gpt import ReferenceGPT, Shape
from reference_gpt import train as train_reference
from trainer import parallel
from trainer.config import ModelConfig, ParallelConfig, RunConfig
from trainer.config_file import override
from trainer.engine.engine import Engine
from trainer.model.init import initial_values
from trainer.model.sharding import Box
from trainer.pipeline import MicroBatch
from trainer.schedule import learning_rate
from trainer.support import FEATURES, combined, pairs
from trainer.training_state import MASTER

NUM_STEPS = 10
# Largest relative differences allowed. A bias starts at zero: after ten steps it is ten updates and nothing else, so
# that bf16's noise of some percent in a gradient shows in it whole.
TOLERANCES = {
    "fp32": {"loss": 2e-6, "grad_norm": 2e-6, "weights": 2e-6, "biases": 2e-6},
    "bf16": {"loss": 1e-3, "grad_norm": 1e-3, "weights": 1e-3, "biases": 5e-2},
}
# Adam divides by the root of the second moment plus eps. Some gradients are zero but for rounding (a key's bias moves
# all scores of a query alike), and with the papers' 1e-8 Adam would blow that rounding up to whole steps.
EPS = 1e-4
LEARNING_RATE = 5e-5  # the first steps change gradients fast; larger ones multiply bf16's rounding with every step

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_heads": 8,
    "vocab_size": 120,  # padded to 128 rows, so the padding mask is part of what is compared
    "seq_length": 32,
}
LLAMA = {
    "num_kv_heads": 4,
    "positions": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "biases": "none",
    "tied_embeddings": False,
}
GPT3 = {"attention_window": 8}


def _settings(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for key, value in values.items()}


def _layout(**parallel: Any) -> dict[str, Any]:
    return _settings("parallel", parallel)


_TP2_SP_PP2_DP2 = _layout(tensor=2, sequence=True, pipeline=2, data=2)

# Deep combinations: axes that meet only here, and odd sizes.
DEEP: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP4": _layout(tensor=4),
    "TP8": _layout(tensor=8),
    "PP4": _layout(pipeline=4),
    "PP4, one micro-batch": _layout(pipeline=4) | {"train.global_batch_size": 8},
    "PP2 x 4 chunks, 8 layers": _layout(pipeline=2, virtual_pipeline=4) | {"model.num_layers": 8},
    "CP4": _layout(context=4),
    "CP8": _layout(context=8),
    "DP4 ZeRO-3": _layout(data=4, zero=3),
    "one layer, TP2 SP": _layout(tensor=2, sequence=True) | {"model.num_layers": 1},
    "ffn 80, vocabulary 40, TP2 x CP2": _layout(tensor=2, context=2)
    | {"model.ffn_hidden_size": 80, "model.vocab_size": 40},
    "TP2 SP x DP2 ZeRO-2": _layout(tensor=2, sequence=True, data=2, zero=2),
    "TP2 SP x DP2 ZeRO-3 full": _layout(tensor=2, sequence=True, data=2, zero=3) | {"train.recompute": "full"},
    "TP2 x PP2 x DP2": _layout(tensor=2, pipeline=2, data=2),
    "TP2 SP x PP2 x DP2 interleaved": _TP2_SP_PP2_DP2 | _layout(virtual_pipeline=2),
    "PP2 x DP2 ZeRO-2 untied interleaved": _layout(pipeline=2, data=2, zero=2, virtual_pipeline=2)
    | {"model.tied_embeddings": False},
    "PP4 ZeRO-2": _layout(pipeline=4, zero=2),
    "PP2 x DP2 ZeRO-3 interleaved full": _layout(pipeline=2, data=2, zero=3, virtual_pipeline=2)
    | {"train.recompute": "full"},
    "TP2 SP x PP2 x DP2 ZeRO-2 interleaved": _TP2_SP_PP2_DP2 | _layout(zero=2, virtual_pipeline=2),
    "TP2 SP x PP2 x DP2 ZeRO-3 interleaved": _TP2_SP_PP2_DP2 | _layout(zero=3, virtual_pipeline=2),
    "PP2 x DP2 ZeRO-2 interleaved offload": _layout(
        pipeline=2, data=2, zero=2, virtual_pipeline=2, offload="optimizer"
    ),
    "PP2 x CP2 x DP2 ZeRO-3 offload": _layout(pipeline=2, context=2, data=2, zero=3, offload="optimizer"),
    "CP2 x TP2 x PP2": _layout(context=2, tensor=2, pipeline=2),
    "CP2 x TP2 SP x PP2 interleaved selective": _layout(
        context=2, tensor=2, sequence=True, pipeline=2, virtual_pipeline=2
    )
    | {"train.recompute": "selective"},
    "CP2 x DP2 ZeRO-3 x TP2 SP": _layout(context=2, data=2, zero=3, tensor=2, sequence=True),
    "CP2 x DP2 x PP2": _layout(context=2, data=2, pipeline=2),
    "Llama-class": _settings("model", LLAMA),
    "Llama-class TP2 SP x PP2 x CP2": _settings("model", LLAMA)
    | _layout(tensor=2, sequence=True, pipeline=2, context=2),
    "Llama-class CP2 x DP2 ZeRO-3 full": _settings("model", LLAMA)
    | _layout(context=2, data=2, zero=3)
    | {"train.recompute": "full"},
    "Llama-class PP2 x DP2 ZeRO-2 interleaved": _settings("model", LLAMA)
    | _layout(pipeline=2, data=2, zero=2, virtual_pipeline=2),
    "GPT-3 TP2 SP x PP2 x DP2 interleaved": _settings("model", GPT3) | _TP2_SP_PP2_DP2 | _layout(virtual_pipeline=2),
    "GPT-3 TP2 x CP2 x DP2 ZeRO-2": _settings("model", GPT3) | _layout(tensor=2, context=2, data=2, zero=2),
    "GPT-1 TP2 SP x PP2": {"model.norm_placement": "post"} | _layout(tensor=2, sequence=True, pipeline=2),
    "GPT-1 PP4 full": {"model.norm_placement": "post", "train.recompute": "full"} | _layout(pipeline=4),
}


def _cases() -> dict[str, dict[str, Any]]:
    """Every feature alone, every pair, and the deep combinations: settings by dotted key."""
    cases = {name: dict(feature.settings) for name, feature in FEATURES.items()}
    for one, other in pairs():
        cases[f"{one.name} + {other.name}"] = combined(one, other)
    for name, settings in DEEP.items():
        cases[name] = settings
        cases[f"{name} + bf16"] = settings | {"train.precision": "bf16"}
    return cases


CASES = _cases()


@dataclass(frozen=True)
class Difference:
    """Relative; the largest over all steps, and over all tensors (in L2 norm) for the weights after the last."""

    precision: str
    loss: float
    grad_norm: float
    weights: float
    """Of tensors that do not start at zero."""
    biases: float
    """Of those that do; 0 where there are none."""

    @property
    def is_within_tolerance(self) -> bool:
        return all(getattr(self, name) <= bound for name, bound in TOLERANCES[self.precision].items())


def config_of(case: str) -> RunConfig:
    tree = {
        "model": dict(MODEL),
        "train": {"global_batch_size": 64, "micro_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": LEARNING_RATE, "clip_grad_norm": 0.5, "weight_decay": 0.1, "eps": EPS},
    }
    return override(tree, [f"{key}={json.dumps(value)}" for key, value in CASES[case].items()])


def global_batch(config: RunConfig, step: int) -> torch.Tensor:
    """Sequences of one step [global batch, s + 1]: arithmetic progressions with noise, so there is structure."""
    generator = torch.Generator().manual_seed(77_000 + step)
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    start = torch.randint(0, config.model.vocab_size, (shape[0], 1), generator=generator)
    stride = torch.randint(1, 7, (shape[0], 1), generator=generator)
    progression = (start + stride * torch.arange(shape[1])) % config.model.vocab_size
    noise = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.1, noise, progression)


def learning_rates(config: RunConfig, num_steps: int = NUM_STEPS) -> list[float]:
    return [learning_rate(config, (step + 1) * config.tokens_per_step) for step in range(num_steps)]


def initial_weights(config: RunConfig, model: ReferenceGPT) -> dict[str, torch.Tensor]:
    """What the product starts from, as whole tensors."""
    return {
        name: initial_values(
            Box(name, tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape), 0), config.model, config.seed
        )
        for name, tensor in model.global_tensors().items()
    }


def reference_of(model: ModelConfig) -> ReferenceGPT:
    given = {field.name for field in fields(Shape)} - {"ffn_hidden_size", "padded_vocab_size"}
    return ReferenceGPT(
        ffn_hidden_size=model.ffn_size,
        padded_vocab_size=model.padded_vocab_size,
        **{name: getattr(model, name) for name in given},
    )


def run_reference(
    config: RunConfig, num_steps: int = NUM_STEPS
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """(loss, grad norm) of each step and the final weights. Layouts share what one process computes: it runs once."""
    train = config.train.model_copy(update={"recompute": "none"})
    alone = config.model_copy(update={"parallel": ParallelConfig(), "train": train})
    return _run_reference(alone.model_dump_json(), num_steps)


@cache
def _run_reference(settings: str, num_steps: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    config = RunConfig.model_validate_json(settings)
    model = reference_of(config.model)
    model.load_global(initial_weights(config, model))
    micro = config.train.micro_batch_size
    history = train_reference(
        model,
        [global_batch(config, step).split(micro) for step in range(num_steps)],
        lrs=learning_rates(config, num_steps),
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip=config.optimizer.clip_grad_norm,
        precision=config.train.precision,
    )
    return history, model.global_tensors()


def train_rank(
    config: RunConfig, device: torch.device, num_steps: int = NUM_STEPS
) -> tuple[list[tuple[float, float]], list[Any]]:
    """One rank's run: (loss, grad norm) of each step, and the blocks of the final weights that it owns."""
    engine = Engine(config, device)
    engine.state.reset()
    micro, replicas, replica = config.train.micro_batch_size, parallel.data_size(), parallel.data_rank()
    history = []
    for step, lr in enumerate(learning_rates(config, num_steps)):
        mine = global_batch(config, step).view(-1, replicas, micro, config.model.seq_length + 1)[:, replica]
        stats = engine.train_step([MicroBatch(tokens) for tokens in mine], lr, step)
        history.append((stats.loss, stats.grad_norm))
    blocks = [(f.box, f.tensors[MASTER].clone()) for f in engine.state.fragments() if f.is_main]
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


def compare(case: str, num_steps: int = NUM_STEPS) -> Difference:
    config = config_of(case)
    reference_history, reference_weights = run_reference(config, num_steps)
    results = run_on_ranks(config, partial(train_rank, num_steps=num_steps))
    assert all(history == results[0][0] for history, _ in results), "ranks disagree about loss or gradient norm"
    history, weights = results[0][0], assemble([blocks for _, blocks in results])
    assert weights.keys() == reference_weights.keys(), weights.keys() ^ reference_weights.keys()
    distance = {key: _relative_distance(weights[key], reference) for key, reference in reference_weights.items()}
    starts = initial_weights(config, reference_of(config.model))
    return Difference(
        config.train.precision,
        loss=max(abs(a - b) / b for (a, _), (b, _) in zip(history, reference_history, strict=True)),
        grad_norm=max(abs(a - b) / b for (_, a), (_, b) in zip(history, reference_history, strict=True)),
        weights=max(distance[key] for key, start in starts.items() if start.any()),
        biases=max((distance[key] for key, start in starts.items() if not start.any()), default=0.0),
    )


def main(wanted: Sequence[str]) -> int:
    """Print the table; arguments choose the cases whose names contain one of them."""
    torch.set_num_threads(1)
    print(f"{'combination':50}{'ranks':>6}{'loss':>10}{'grad norm':>11}{'weights':>10}{'biases':>9}{'seconds':>9}")
    failures = 0
    for case in CASES:
        if wanted and not any(part in case for part in wanted):
            continue
        started = time.perf_counter()
        difference = compare(case)
        verdict = "" if difference.is_within_tolerance else "  TOO FAR"
        failures += bool(verdict)
        print(
            f"{case:50}{config_of(case).parallel.num_ranks:6}{difference.loss:10.1e}{difference.grad_norm:11.1e}"
            f"{difference.weights:10.1e}{difference.biases:9.1e}{time.perf_counter() - started:9.1f}{verdict}",
            flush=True,
        )
    print(f"{failures} of the combinations are beyond their tolerance" if failures else "all within tolerance")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
