"""What `trainer.plan` says of memory, against what real models and engines keep."""

import gc
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parity import global_batch
from planned_runs import LLAMA_CLASS
from ranks import run_on_ranks
from trainer import parallel
from trainer.config import RunConfig
from trainer.config_file import override
from trainer.data.batches import MicroBatch
from trainer.engine.deepspeed_config import REDUCE_BUCKET_ELEMENTS
from trainer.engine.engine import Engine
from trainer.model.context_parallel import local_positions
from trainer.model.gpt import build_chunks
from trainer.pipeline import run_schedule
from trainer.plan import (
    activation_bytes_per_microbatch,
    microbatches_in_flight,
    parameters_per_rank,
    state_bytes_per_rank,
)

MODEL = {"num_layers": 4, "hidden_size": 64, "num_heads": 8, "vocab_size": 120, "seq_length": 96}
LLAMA: dict[str, Any] = LLAMA_CLASS | {"model.num_kv_heads": 4}
TP2: dict[str, Any] = {"parallel.tensor": 2}
TP2_SP: dict[str, Any] = {"parallel.tensor": 2, "parallel.sequence": True}
CP2: dict[str, Any] = {"parallel.context": 2}
BANDED: dict[str, Any] = {"model.attention_window": 16}
DROPOUT: dict[str, Any] = {"model.dropout": 0.1}
SELECTIVE: dict[str, Any] = {"train.recompute": "selective"}
FULL: dict[str, Any] = {"train.recompute": "full"}

# Every case is exact but for what the formula leaves out by its docstring.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "fp32": {"train.precision": "fp32"},
    "micro-batch of one": {"train.micro_batch_size": 1},
    "post-norm": {"model.norm_placement": "post"},
    "RMSNorm": {"model.norm": "rms"},
    "RMSNorm fp32": {"model.norm": "rms", "train.precision": "fp32"},
    "SwiGLU": {"model.activation": "swiglu"},
    "no biases": {"model.biases": "none"},
    "GQA": {"model.num_kv_heads": 2},
    "one key-value head": {"model.num_kv_heads": 1},
    "rotary": {"model.positions": "rotary"},
    "rotary GQA fp32": {"model.positions": "rotary", "model.num_kv_heads": 2, "train.precision": "fp32"},
    "banded": BANDED,
    "banded fp32": BANDED | {"train.precision": "fp32"},
    "banded, blocks not whole": {"model.attention_window": 20},
    "banded GQA rotary": BANDED | {"model.num_kv_heads": 2, "model.positions": "rotary"},
    "window as wide as the sequence": {"model.attention_window": 96},
    "dropout": DROPOUT,
    "dropout GQA": DROPOUT | {"model.num_kv_heads": 2},
    "dropout banded": DROPOUT | BANDED,
    "dropout post-norm": DROPOUT | {"model.norm_placement": "post"},
    "TP2": TP2,
    "TP2 GQA": TP2 | {"model.num_kv_heads": 4},
    "TP2, one key-value head each": TP2 | {"model.num_kv_heads": 2},
    "TP2 SP": TP2_SP,
    "TP2 SP dropout": TP2_SP | DROPOUT,
    "TP2 SP post-norm": TP2_SP | {"model.norm_placement": "post"},
    "CP2": CP2,
    "CP2 GQA rotary": CP2 | {"model.num_kv_heads": 4, "model.positions": "rotary"},
    "CP2 banded": CP2 | {"model.attention_window": 20},
    "CP2 dropout": CP2 | DROPOUT,
    "selective": SELECTIVE,
    "selective dropout banded": SELECTIVE | DROPOUT | BANDED,
    "selective GQA rotary": SELECTIVE | {"model.num_kv_heads": 2, "model.positions": "rotary"},
    "selective CP2": SELECTIVE | CP2,
    "full": FULL,
    "full TP2": FULL | TP2,
    "full TP2 SP": FULL | TP2_SP,
    "full CP2 rotary": FULL | CP2 | {"model.positions": "rotary"},
    "Llama-class": LLAMA,
    "Llama-class TP2 SP": LLAMA | TP2_SP,
    "Llama-class CP2": LLAMA | CP2,
    "Llama-class CP2 selective": LLAMA | CP2 | SELECTIVE,
}


def left_out_bytes(config: RunConfig) -> int:
    """What the docstring leaves out: the angles of rotary positions, and random states (an int32 a layer)."""
    rotary = config.model.positions == "rotary"
    angles = 4 * config.model.head_size * config.model.seq_length if rotary else 0
    return angles + (4 * config.model.num_layers if config.train.recompute == "selective" else 0)


def config_of(settings: dict[str, Any]) -> RunConfig:
    tree = {
        "model": dict(MODEL),
        "train": {"global_batch_size": 16, "micro_batch_size": 2, "precision": "bf16"},
        "launch": {"device": "cpu"},
    }
    return override(tree, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def bytes_kept_for_backward(config: RunConfig, _: torch.device) -> int:
    """Of the distinct storages that one real forward pass saves, parameters apart."""
    (chunk,) = build_chunks(config)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if config.model.dropout > 0:
        parallel.seed_dropout(config.seed, 0)
    batch, length = config.train.micro_batch_size, config.model.seq_length
    mine = local_positions(length, parallel.context_rank(), parallel.context_size())
    tokens = torch.zeros(batch, length, dtype=torch.long)[:, mine].contiguous()
    positions = torch.arange(length).expand(batch, -1)[:, mine]
    saved: list[torch.Tensor] = []  # alive to the end, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = chunk.train()(tokens, positions, None, labels=tokens)
    assert losses.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_are_those_kept_for_backward(case: str) -> None:
    config = config_of(ACTIVATIONS[case])
    predicted = activation_bytes_per_microbatch(config)
    for measured in run_on_ranks(config, bytes_kept_for_backward):
        assert 0 <= measured - predicted <= left_out_bytes(config)


def most_in_flight(config: RunConfig, device: torch.device) -> int:
    """Chunks' forward passes that have not seen their backward pass, at most."""
    engine = Engine(config, device)
    engine.state.reset()
    now, most = 0, 0

    def began(_: Any, __: Any, output: torch.Tensor) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        output.register_hook(ended)

    def ended(_: torch.Tensor) -> None:
        nonlocal now
        now -= 1

    for stage in engine.stages:
        stage.register_forward_hook(began)
    micro_batches = [MicroBatch(tokens) for tokens in global_batch(config, 0).split(config.train.micro_batch_size)]
    run_schedule(engine.stages, config.model, micro_batches, forward_only=False)
    assert now == 0
    return most


@pytest.mark.parametrize(
    ("pipeline", "virtual", "num_microbatches"),
    [(1, 1, 4), (2, 1, 4), (4, 1, 8), (4, 1, 2), (2, 2, 2), (2, 2, 8), (4, 2, 8)],
)
def test_schedule_keeps_so_many_microbatches(pipeline: int, virtual: int, num_microbatches: int) -> None:
    config = config_of(
        {
            "model.num_layers": 8,
            "model.seq_length": 16,
            "parallel.pipeline": pipeline,
            "parallel.virtual_pipeline": virtual,
            "train.global_batch_size": 2 * num_microbatches,
            "train.precision": "fp32",
        }
    )
    measured = [most / virtual for most in run_on_ranks(config, most_in_flight)]
    assert measured == [microbatches_in_flight(config.parallel, num_microbatches, stage) for stage in range(pipeline)]


OFFLOAD: dict[str, Any] = {"parallel.offload": "optimizer"}
DP2: dict[str, Any] = {"parallel.data": 2}
INTERLEAVED_DP3: dict[str, Any] = {
    "parallel.data": 3,
    "parallel.pipeline": 2,
    "parallel.virtual_pipeline": 3,
    "train.global_batch_size": 12,
}
STATES: dict[str, dict[str, Any]] = {
    f"ZeRO-{zero} {precision} {layout}": {"parallel.zero": zero, "train.precision": precision} | settings
    for zero in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for layout, settings in {"one rank": {}, "DP2": DP2, "DP2 offload": DP2 | OFFLOAD}.items()
} | {
    "ZeRO-1 TP2": TP2,
    "ZeRO-1 DP3": {"parallel.data": 3, "train.global_batch_size": 12},
    "ZeRO-2 fp32 DP3 interleaved": INTERLEAVED_DP3 | {"parallel.zero": 2, "train.precision": "fp32"},
    "ZeRO-2 fp32 DP3 interleaved offload": INTERLEAVED_DP3 | OFFLOAD | {"parallel.zero": 2, "train.precision": "fp32"},
    "ZeRO-3 Llama-class TP2 DP2": LLAMA | TP2 | DP2 | {"parallel.zero": 3},
    "ZeRO-2 CP2": CP2 | {"parallel.zero": 2},
    "ZeRO-2 PP2": {"parallel.pipeline": 2, "parallel.zero": 2},
    "ZeRO-3 PP2 untied": {"parallel.pipeline": 2, "parallel.zero": 3, "model.tied_embeddings": False},
}
# The fast ones have fp32 and bf16 under every ZeRO stage, and offload under 2 and 3.
SLOW = {
    "ZeRO-1 fp32 DP2",
    "ZeRO-1 fp32 DP2 offload",
    "ZeRO-1 bf16 one rank",
    "ZeRO-1 bf16 DP2 offload",
    "ZeRO-2 fp32 one rank",
    "ZeRO-2 bf16 one rank",
    "ZeRO-2 fp32 DP2",
    "ZeRO-2 fp32 DP2 offload",
    "ZeRO-3 fp32 one rank",
    "ZeRO-3 fp32 DP2",
    "ZeRO-3 bf16 one rank",
    "ZeRO-3 bf16 DP2 offload",
    "ZeRO-1 DP3",
    "ZeRO-2 fp32 DP3 interleaved offload",
    "ZeRO-3 Llama-class TP2 DP2",
}
BUCKET_BYTES = 4 * REDUCE_BUCKET_ELEMENTS  # which the plan counts apart


A_FEW_NUMBERS = 64  # bytes below which a tensor is a loss, or a count of updates


def live_storages(passing: tuple[int, ...] = ()) -> dict[int, int]:
    """Bytes by address of every storage that a tensor or its gradient holds in this process, the parent's apart.

    Not of shapes that DeepSpeed notes as meta tensors, nor of what is `passing`, by its shape, between stages.
    """
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if not tensor.is_meta and tensor.shape != passing
    }


def state_of_rank(config: RunConfig, device: torch.device) -> tuple[int, int, int, int]:
    """(stage, replica that ZeRO knows it as, weights, bytes of state before its second step's update)."""
    micro, replicas, replica = config.train.micro_batch_size, parallel.data_size(), parallel.data_rank()
    batches = [
        global_batch(config, step).view(-1, replicas, micro, config.model.seq_length + 1)[:, replica]
        for step in range(2)
    ]
    known = frozenset(live_storages())
    engine = Engine(config, device)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for s in engine.stages for p in s.module.parameters())
    state_bytes = 0
    finalize = engine._zero.finalize_gradients

    def finalize_and_count() -> None:
        """A step's gradients are then complete."""
        nonlocal state_bytes
        finalize()
        live = live_storages((config.model.seq_length, micro, config.model.hidden_size))
        mine = (size for address, size in live.items() if address not in known and size != BUCKET_BYTES)
        state_bytes = sum(size for size in mine if size > A_FEW_NUMBERS)

    engine._zero.finalize_gradients = finalize_and_count
    engine.state.reset()
    for step, batch in enumerate(batches):
        engine.train_step([MicroBatch(tokens) for tokens in batch], 1e-4, step)
    return parallel.pipeline_rank(), dist.get_rank(parallel.data_group()), num_parameters, state_bytes


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in STATES])
def test_state_is_what_the_engine_allocates(case: str) -> None:
    shape = {"model.num_layers": 6, "model.hidden_size": 384, "model.seq_length": 16, "train.global_batch_size": 4}
    config = config_of(shape | STATES[case])
    for stage, replica, num_parameters, measured in run_on_ranks(config, state_of_rank):
        assert parameters_per_rank(config, stage) == num_parameters
        few_numbers = 2 * 4 + (1 if config.parallel.zero == 3 else 0)  # counts of updates, a flag
        planned = state_bytes_per_rank(config, stage, replica).total - few_numbers
        assert measured - left_out_bytes(config) == planned
