"""What holds of every plan, whatever the layout, the model and the cluster."""

import math
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.planning.cluster import Cluster, load
from launcher.planning.planner import make_plan
from launcher.planning.rank_memory import fullest, rank_memory
from launcher.planning.step_time import StepModel
from launcher.planning.timeline import timeline
from trainer import config_file
from trainer.config import RunConfig, UserError

CLUSTERS = st.sampled_from(["a100-80", "h100", "h200", "b200", "cpu"])
LAYOUTS = st.fixed_dictionaries(
    {
        "parallel.tensor": st.sampled_from([1, 2, 4, 8]),
        "parallel.pipeline": st.sampled_from([1, 2, 4]),
        "parallel.virtual_pipeline": st.sampled_from([1, 2]),
        "parallel.context": st.sampled_from([1, 2]),
        "parallel.data": st.sampled_from([1, 2, 8]),
        "parallel.zero": st.sampled_from([1, 2, 3]),
        "parallel.sequence": st.booleans(),
        "parallel.offload": st.sampled_from(["none", "optimizer"]),
        "train.recompute": st.sampled_from(["none", "selective", "full"]),
        "train.precision": st.sampled_from(["bf16", "fp32"]),
        "train.micro_batch_size": st.sampled_from([1, 2]),
        "model.attention_window": st.sampled_from([None, 256]),
    }
)
BASE: dict[str, Any] = {
    "model.num_layers": 8,
    "model.hidden_size": 1024,
    "model.num_heads": 16,
    "model.seq_length": 2048,
    "train.global_batch_size": 128,
    "launch.device": "cuda",
}
FASTER = {
    "bf16_flops": 2.0,
    "fp32_flops": 2.0,
    "memory_bytes_per_second": 2.0,
    "host_link_bytes_per_second": 2.0,
    "host_memory_bytes_per_second": 2.0,
    "link_bytes_per_second": 2.0,
    "link_latency_seconds": 0.5,
    "network_bytes_per_second": 2.0,
    "network_latency_seconds": 0.5,
    "storage_bytes_per_second": 2.0,
    "memory_bytes": 2.0,
}
ALMOST = 1 + 1e-9  # sums of the same numbers in another order
steady = settings(max_examples=30, derandomize=True, deadline=None)


def config_of(layout: dict[str, Any], **changes: Any) -> RunConfig:
    """Layouts that cannot be are passed over."""
    tree: dict[str, Any] = {}
    for key, value in (BASE | layout | {key.replace("__", "."): value for key, value in changes.items()}).items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    try:
        return config_file.from_tree(tree)
    except UserError:
        assume(False)
        raise


def changed(cluster: Cluster, factors: dict[str, float]) -> Cluster:
    return cluster.model_copy(update={name: getattr(cluster, name) * factor for name, factor in factors.items()})


@steady
@given(layout=LAYOUTS, cluster=CLUSTERS)
def test_totals_are_the_sums_of_their_parts_on_every_stage(layout: dict[str, Any], cluster: str) -> None:
    config, where = config_of(layout), load(cluster)
    memories = [rank_memory(config, where, stage) for stage in range(config.parallel.pipeline)]
    for memory in memories:
        assert all(part >= 0 and math.isfinite(part) for part in astuple(memory))
        assert math.fsum(astuple(memory)) == pytest.approx(memory.total)
    assert fullest(config, where).memory.total == max(memory.total for memory in memories)
    model = StepModel(config, where)
    step = model.step()
    assert all(part >= 0 and math.isfinite(part) for part in astuple(step))
    assert math.fsum(astuple(step)) == pytest.approx(step.seconds)
    for stage, chunks in zip(model.stages, model.chunks, strict=True):
        assert stage.seconds == pytest.approx(sum(chunk.seconds for chunk in chunks))


@steady
@given(layout=LAYOUTS, cluster=CLUSTERS)
def test_a_step_is_at_least_what_its_busiest_stage_works(layout: dict[str, Any], cluster: str) -> None:
    """And no less than the schedule played through, but for what interleaving hides; above it only by messages."""
    model = StepModel(config_of(layout), load(cluster))
    step = model.step()
    passes = step.seconds - step.data - step.optimizer - step.input - step.checkpoint
    busiest = model.config.num_microbatches * max(stage.seconds for stage in model.stages)
    assert passes * ALMOST >= busiest
    played = timeline(model).seconds
    assert 0.96 * played <= passes <= 1.001 * played + step.pipeline


@steady
@given(layout=LAYOUTS, cluster=CLUSTERS)
def test_more_tensor_parallel_never_takes_more_memory_for_state(layout: dict[str, Any], cluster: str) -> None:
    where = load(cluster)
    less, more = (config_of(layout, parallel__tensor=layout["parallel.tensor"] * factor) for factor in (1, 2))
    for stage in range(less.parallel.pipeline):
        before, after = (rank_memory(config, where, stage) for config in (less, more))
        for part in ("weights", "gradients", "optimizer", "activations", "logits"):
            assert getattr(after, part) <= getattr(before, part) * ALMOST, part


@steady
@given(layout=LAYOUTS, cluster=CLUSTERS, factor=st.floats(1.0, 4.0))
def test_what_fits_fits_with_more_room(layout: dict[str, Any], cluster: str, factor: float) -> None:
    config, where = config_of(layout), load(cluster)
    need = fullest(config, where).memory.total
    small = where.model_copy(update={"memory_bytes": need * 1.01})
    assert make_plan(config, small).fits
    assert make_plan(config, changed(small, {"memory_bytes": factor})).fits
    assert not make_plan(config, where.model_copy(update={"memory_bytes": need * 0.99})).fits


@steady
@given(layout=LAYOUTS, cluster=CLUSTERS, name=st.sampled_from(sorted(FASTER)))
def test_better_machines_never_slow_a_step(layout: dict[str, Any], cluster: str, name: str) -> None:
    config, where = config_of(layout), load(cluster)
    before, after = (StepModel(config, each).step() for each in (where, changed(where, {name: FASTER[name]})))
    assert after.seconds <= before.seconds * ALMOST


@steady
@given(
    layout=LAYOUTS,
    cluster=CLUSTERS,
    more=st.sampled_from(
        [
            {"model__num_layers": 16},
            {"model__seq_length": 4096},
            {"model__hidden_size": 2048},
            {"model__vocab_size": 128_000},
            {"train__global_batch_size": 256},
            {"train__recompute": "full"},
        ]
    ),
)
def test_more_work_takes_longer(layout: dict[str, Any], cluster: str, more: dict[str, Any]) -> None:
    where = load(cluster)
    before, after = (StepModel(config_of(layout, **each), where).step().seconds for each in ({}, more))
    assert after >= before if "train__recompute" in more else after > before


@steady
@given(layout=LAYOUTS, price=st.floats(0.1, 100.0), watts=st.floats(10.0, 2000.0), times=st.integers(2, 10))
def test_money_and_energy_are_linear_in_hours(layout: dict[str, Any], price: float, watts: float, times: int) -> None:
    rates = {"price_per_device_hour": price, "watts_per_device": watts}
    config, where = config_of(layout), load("h100").model_copy(update=rates)
    plan = make_plan(config, where)
    assert plan.price == pytest.approx(price * plan.device_hours)
    assert plan.energy_kwh == pytest.approx(watts / 1000 * plan.device_hours)
    longer = make_plan(config_of(layout, train__total_tokens=times * config.train.total_tokens), where)
    assert longer.device_hours > plan.device_hours
    assert longer.price == pytest.approx(price * longer.device_hours)
