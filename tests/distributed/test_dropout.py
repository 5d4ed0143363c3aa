"""Dropout draws from streams that only (seed, step, place) decide: whatever else happened, a step is the same step."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from parity import EPS, LEARNING_RATE, global_batch
from ranks import run_on_ranks
from trainer import parallel
from trainer.checkpoint import sharded
from trainer.checkpoint.format import store
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.waiting_save import save
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.data.batches import MicroBatch
from trainer.engine.engine import Engine
from trainer.model.attention import CausalAttention
from trainer.model.gpt import transformer_config
from trainer.model.sharding import Box
from trainer.parallel import dropout_seed

NUM_STEPS = 3
CHECKPOINT_AT = 1

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2 SP": {"tensor": 2, "sequence": True},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2 SP x PP2 interleaved": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
    "PP2": {"pipeline": 2},
    "DP2 ZeRO-1": {"data": 2},
    "DP2 ZeRO-3": {"data": 2, "zero": 3},
    "CP2": {"context": 2},
    "CP2 x TP2": {"context": 2, "tensor": 2},
    "PP2 x DP2 ZeRO-3 interleaved": {"pipeline": 2, "data": 2, "zero": 3, "virtual_pipeline": 2},
    "PP2 x DP2 ZeRO-2 offload": {"pipeline": 2, "data": 2, "zero": 2, "offload": "optimizer"},
}


@dataclass(frozen=True)
class Trained:
    """What one rank ends with."""

    history: list[tuple[float, float]]
    fragments: list[tuple[Box, dict[str, Tensor]]]
    """Of the training state, this rank's copies of what others hold included."""


def config_of(
    layout: str, *, dropout: float = 0.1, precision: str = "bf16", model: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    sizes = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "vocab_size": 120, "seq_length": 16}
    return from_tree(
        {
            "model": {**sizes, "dropout": dropout, **(model or {})},
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "precision": precision, **train},
            "optimizer": {"lr": LEARNING_RATE, "clip_grad_norm": 0.5, "eps": EPS},
            "parallel": LAYOUTS[layout],
        }
    )


def my_batches(config: RunConfig, step: int) -> list[MicroBatch]:
    batches = global_batch(config, step).view(-1, parallel.data_size(), config.train.micro_batch_size, 17)
    return [MicroBatch(tokens) for tokens in batches[:, parallel.data_rank()]]


def train(
    checkpoints: Path | None = None, *, resume: bool = False, evaluate: bool = False
) -> Callable[[RunConfig, torch.device], Trained]:
    """A rank that trains, saving a checkpoint on the way if told where, or continuing from it."""

    def rank(config: RunConfig, device: torch.device) -> Trained:
        engine = Engine(config, device)
        first, history = 0, []
        if resume:
            assert checkpoints is not None
            first = sharded.load(engine, checkpoints / store.folder_name(CHECKPOINT_AT)).step
        else:
            engine.state.reset()
        for step in range(first, NUM_STEPS):
            if evaluate:
                engine.evaluate(my_batches(config, 99))
            stats = engine.train_step(my_batches(config, step), LEARNING_RATE, step)
            history.append((stats.loss, stats.grad_norm))
            if checkpoints is not None and step + 1 == CHECKPOINT_AT:
                save(engine, checkpoints, Manifest(step + 1, 0, config.model_dump(mode="json")))
        return Trained(
            history, [(f.box, {k: t.clone() for k, t in f.tensors.items()}) for f in engine.state.fragments()]
        )

    return rank


def assert_same(found: list[Trained], expected: list[Trained], since: int = 0) -> None:
    """To the last bit, on every rank."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.history == theirs.history[since:]
        for (box, tensors), (other_box, others) in zip(mine.fragments, theirs.fragments, strict=True):
            assert box == other_box
            assert all(torch.equal(tensors[kind], others[kind]) for kind in others), box


@pytest.mark.parametrize(
    "layout",
    [
        "TP2 SP x PP2 interleaved",
        "DP2 ZeRO-1",
        "PP2 x DP2 ZeRO-3 interleaved",
        "PP2 x DP2 ZeRO-2 offload",
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("CP2 x TP2", "DP2 ZeRO-3")),
    ],
)
def test_runs_resume_bit_for_bit(layout: str, tmp_path: Path) -> None:
    """Also where the one that resumes evaluates in between, which draws nothing."""
    config = config_of(layout)
    undisturbed = run_on_ranks(config, train(tmp_path))
    resumed = run_on_ranks(config, train(tmp_path, resume=True, evaluate=True))
    assert_same(resumed, undisturbed, since=CHECKPOINT_AT)


@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP2 SP x PP2 interleaved", marks=pytest.mark.slow)])
def test_runs_repeat_bit_for_bit(layout: str) -> None:
    config = config_of(layout)
    assert_same(run_on_ranks(config, train(evaluate=True)), run_on_ranks(config, train()))


@pytest.mark.parametrize(
    "layout",
    [
        "one rank",
        "TP2 SP",
        "CP2",
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in ("PP2", "PP2 x DP2 ZeRO-3 interleaved", "CP2 x TP2")
        ),
    ],
)
def test_recomputing_activations_changes_no_bit(layout: str) -> None:
    banded = {"attention_window": 5}
    keeping = run_on_ranks(config_of(layout, precision="fp32", model=banded), train())
    for recompute in ("selective", "full"):
        config = config_of(layout, precision="fp32", model=banded, recompute=recompute)
        assert_same(run_on_ranks(config, train()), keeping)


@pytest.mark.parametrize(
    ("layout", "norm_placement"),
    [
        ("TP2 x PP2", "post"),
        ("TP2 SP x PP2 interleaved", "pre"),
        pytest.param("TP2 x PP2", "pre", marks=pytest.mark.slow),
        pytest.param("TP2 SP x PP2 interleaved", "post", marks=pytest.mark.slow),
    ],
)
def test_copies_of_a_parameter_stay_equal(layout: str, norm_placement: str) -> None:
    """Norms and biases on tensor-parallel ranks, a tied embedding on the first and last pipeline stage."""
    ranks = run_on_ranks(config_of(layout, model={"norm_placement": norm_placement}), train())
    copies: dict[Box, list[dict[str, Tensor]]] = {}
    for box, tensors in (fragment for rank in ranks for fragment in rank.fragments):
        copies.setdefault(Box(box.key, box.global_shape, box.offset, box.shape, 0), []).append(tensors)
    shared = {box: held for box, held in copies.items() if len(held) > 1}
    kinds = {".".join(box.key.split(".")[-2:]) for box in shared}
    expected = {"position_embeddings.weight", "linear_proj.bias", "linear_fc2.bias"}
    expected |= {"input_layernorm.weight", "final_layernorm.bias"} if norm_placement == "pre" else {"norm.weight"}
    assert kinds >= expected | ({"word_embeddings.weight"} if "PP2" in layout else set())
    for box, (first, *others) in shared.items():
        for other in others:
            assert all(torch.equal(first[kind], other[kind]) for kind in first), box


# ------------------------------------------------------------------------------------------------------------- streams


def losses_with_weights_at_rest(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Losses of one batch at a learning rate of zero: only the dropout masks can make a difference."""
    engine = Engine(config, device)
    engine.state.reset()

    def loss(step: int) -> float:
        return engine.train_step(my_batches(config, 0), 0.0, step).loss

    steps = [loss(step) for step in (0, 1, 2, 1, 0)]
    total, count = engine.evaluate(my_batches(config, 0))
    engine.config = config.model_copy(update={"seed": config.seed + 1})
    return {"steps": steps, "evaluated": total / count, "other seed": loss(0)}


@pytest.mark.parametrize("layout", ["one rank", "TP2 SP", "DP2 ZeRO-1"])
def test_steps_and_seeds_have_masks_of_their_own(layout: str) -> None:
    (found, *_) = run_on_ranks(config_of(layout, precision="fp32"), losses_with_weights_at_rest)
    zero, one, two, one_again, zero_again = found["steps"]
    assert (zero, one) == (zero_again, one_again)
    assert len({zero, one, two, found["evaluated"], found["other seed"]}) == 5
    (plain, *_) = run_on_ranks(config_of(layout, precision="fp32", dropout=0.0), losses_with_weights_at_rest)
    assert {*plain["steps"], plain["other seed"]} == {plain["steps"][0]}
    assert plain["evaluated"] == found["evaluated"] == pytest.approx(plain["steps"][0], rel=1e-6)


def draws(config: RunConfig, _: torch.device) -> dict[int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """By step: what the stream that tensor-parallel ranks share and the one they do not share begin with."""
    found = {}
    for step in (0, 1, 2, 1):
        parallel.seed_dropout(config.seed, step)
        with get_cuda_rng_tracker().fork():
            own = tuple(torch.rand(3).tolist())
        drawn = tuple(torch.rand(3).tolist()), own
        assert found.setdefault(step, drawn) == drawn
    return found


def test_tensor_parallel_ranks_share_one_stream_and_nobody_shares_more() -> None:
    config = from_tree({"parallel": {"tensor": 2, "pipeline": 2, "data": 2}, "train": {"global_batch_size": 8}})
    per_rank = run_on_ranks(config, draws)
    for step in (0, 1, 2):
        shared, own = zip(*(found[step] for found in per_rank), strict=True)
        assert shared[0::2] == shared[1::2]  # ranks 2n and 2n + 1 are tensor-parallel neighbours
        assert len(set(shared)) == 4 and len(set(own)) == 8
    every = {stream for found in per_rank for pair in found.values() for stream in pair}
    assert len(every) == 3 * (4 + 8)


def attend_to_all_alike(config: RunConfig, _: torch.device) -> tuple[Tensor, float]:
    """Attention whose weights are all alike: what comes out of a head shows which of them dropout left."""
    settings = transformer_config(config)
    attention = CausalAttention(settings, layer_number=1, attn_mask_type=None, attention_type="self").train()
    alike, ones = torch.zeros(16, 2, 2, 8), torch.ones(16, 2, 2, 8)
    parallel.seed_dropout(config.seed, 0)
    with get_cuda_rng_tracker().fork() if settings.sequence_parallel else nullcontext():  # as megatron-core's layers do
        kept = attention(alike, alike, ones)
    return kept, torch.rand(1).item()


@pytest.mark.parametrize("layout", ["TP2 SP", "TP2 x PP2"])
def test_heads_on_different_ranks_drop_different_weights(layout: str) -> None:
    per_rank = run_on_ranks(config_of(layout, precision="fp32"), attend_to_all_alike)
    kept, drawn_after = zip(*per_rank, strict=True)
    assert all(0 < (mask == 1 / 0.9).float().mean() < 1 for mask in kept)
    assert not any(torch.equal(mine, theirs) for i, mine in enumerate(kept) for theirs in kept[:i])
    assert drawn_after[0::2] == drawn_after[1::2]  # the shared stream has not moved apart


def test_seeds_of_streams_never_meet() -> None:
    """For 64 steps of 256 places with 8 tensor-parallel ranks each, under several seeds."""
    for seed in (0, 1234, 2**31 - 1):
        places = [dropout_seed(seed, step, place) for step in range(64) for place in range(256)]
        assert all(0 <= base < 2**31 for base in places)
        streams = {base + extra for base in places for extra in (0, *range(2718, 2718 + 8))}
        assert len(streams) == len(places) * 9
