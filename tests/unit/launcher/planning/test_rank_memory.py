"""Memory by part: sums, and what must and must not grow."""

import math
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.planning.cluster import load
from launcher.planning.planner import make_plan
from launcher.planning.rank_memory import fullest, rank_memory, with_recompute
from trainer import plan
from trainer.config import RunConfig
from trainer.config_file import from_tree

H100 = load("h100")
PRESETS = ["gpt2_xl", "gpt3_6_7b", "gpt3_175b", "llama3_8b"]


def config_of(preset: str = "gpt3_6_7b", **sections: Any) -> RunConfig:
    train = {"global_batch_size": 64, "ramp_start_batch_size": None, "ramp_tokens": 0} | sections.pop("train", {})
    return from_tree({"preset": preset, "launch": {"device": "cuda"}, "train": train, **sections})


def test_weights_gradients_and_optimizer_of_175b_are_as_published() -> None:
    """Korthikanti et al. 2022, table 5: 45.56 GiB, of layers alone; there without replicas."""
    config = config_of("gpt3_175b", parallel={"tensor": 8, "pipeline": 8})
    memory = rank_memory(config, H100, stage=4)
    assert (memory.weights + memory.gradients + memory.optimizer) / 2**30 == pytest.approx(45.56, rel=0.01)


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    config = config_of("gpt3_175b", parallel={"tensor": 8, "pipeline": 8, "sequence": True})
    first, last = (rank_memory(config, H100, stage) for stage in (0, 7))
    assert first.activations == 8 * plan.activation_bytes_per_microbatch(config, 0)
    assert first.logits == 0 and last.logits == plan.activation_bytes_of_output(config)
    assert last.activations + last.logits == plan.activation_bytes_per_microbatch(config, 7)
    assert fullest(config, H100).stage == 0


def test_what_is_offloaded_is_not_on_the_device() -> None:
    layout = {"data": 4, "zero": 2}
    stays, leaves = (
        rank_memory(config_of(parallel=layout | {"offload": offload}), H100, 0) for offload in ("none", "optimizer")
    )
    assert stays.optimizer > 0 and leaves.optimizer == 0 == leaves.gradients
    assert leaves.total < stays.total
    assert min(astuple(leaves)) >= 0


@pytest.mark.parametrize("preset", PRESETS)
def test_recomputation_trades_activations(preset: str) -> None:
    config = config_of(preset)
    none, selective, full = (
        fullest(with_recompute(config, each), H100).memory for each in ("none", "selective", "full")
    )
    assert none.activations >= selective.activations > full.activations
    assert none.weights == full.weights


@pytest.mark.parametrize("preset", PRESETS)
def test_more_tensor_parallel_never_raises_the_memory_of_weights(preset: str) -> None:
    sizes = [each for each in (1, 2, 4, 8) if from_tree({"preset": preset}).model.num_heads % each == 0]
    for zero in (1, 3):
        found = [
            fullest(config_of(preset, parallel={"tensor": each, "zero": zero, "data": 2}), H100).memory.weights
            for each in sizes
        ]
        assert found == sorted(found, reverse=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4]),
    data=st.sampled_from([1, 4]),
    micro_batch=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    cluster=st.sampled_from(["a100-80", "h200", "cpu"]),
)
def test_parts_add_up_and_room_only_helps(
    tensor: int, pipeline: int, data: int, micro_batch: int, recompute: str, cluster: str
) -> None:
    config = config_of(
        train={"micro_batch_size": micro_batch, "recompute": recompute},
        parallel={"tensor": tensor, "pipeline": pipeline, "data": data},
    )
    small = load(cluster)
    large = small.model_copy(update={"memory_bytes": 2 * small.memory_bytes})
    before, after = make_plan(config, small), make_plan(config, large)
    assert all(value >= 0 for value in astuple(before.memory))
    assert math.fsum(astuple(before.memory)) == pytest.approx(before.memory.total)
    assert before.memory == after.memory
    assert after.fits or not before.fits
    assert after.free_bytes - before.free_bytes == pytest.approx(small.memory_bytes)
