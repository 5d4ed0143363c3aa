"""Times of a step against schedules played through event by event, closed forms, and what must grow with the work."""

import math
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.planning.cluster import Cluster, load
from launcher.planning.constants import GPU
from launcher.planning.practice import Practice
from launcher.planning.rates import Group, Rates
from launcher.planning.step_time import StepModel
from trainer import plan
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

H100 = load("h100")
FASTEST_LINKS = H100.model_copy(
    update={
        "link_bytes_per_second": 1e30,
        "network_bytes_per_second": 1e30,
        "link_latency_seconds": 0.0,
        "network_latency_seconds": 0.0,
    }
)


def config_of(**sections: Any) -> RunConfig:
    model = {"num_layers": 8, "hidden_size": 1024, "num_heads": 16, "seq_length": 2048} | sections.pop("model", {})
    return from_tree({"model": model, "launch": {"device": "cuda"}, **sections})


def step_seconds(config: RunConfig, cluster: Cluster = H100, practice: Practice | None = None) -> float:
    return StepModel(config, cluster, practice or Practice()).step().seconds


def play_1f1b(forwards: list[float], backwards: list[float], num: int) -> float:
    """When the last stage's work is done, if each stage does its operations in 1F1B's order, as soon as it can."""
    stages = len(forwards)
    orders = []
    for stage in range(stages):
        warm_up = min(stages - 1 - stage, num)
        order = [("f", i) for i in range(warm_up)]
        for i in range(num - warm_up):
            order += [("f", warm_up + i), ("b", i)]
        orders.append(order + [("b", i) for i in range(num - warm_up, num)])
    ends: dict[tuple[str, int, int], float] = {}
    free, at = [0.0] * stages, [0] * stages
    while any(at[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            if at[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][at[stage]]
            neighbour = stage - 1 if kind == "f" else stage + 1
            needed = (kind, neighbour, i) if 0 <= neighbour < stages else None
            if needed is not None and needed not in ends:
                continue
            start = max(free[stage], ends[needed] if needed else 0.0)
            free[stage] = ends[(kind, stage, i)] = start + (forwards if kind == "f" else backwards)[stage]
            at[stage] += 1
    return max(free)


@pytest.mark.parametrize(("pipeline", "num"), [(2, 2), (4, 4), (4, 9), (8, 16)])
def test_pipelines_take_as_long_as_their_schedule_played_through(pipeline: int, num: int) -> None:
    """Also with a last stage that is several times as long as the others, for its output layer."""
    config = config_of(train={"global_batch_size": num}, parallel={"pipeline": pipeline})
    model = StepModel(config, FASTEST_LINKS)
    forwards = [stage.forward.seconds for stage in model.stages]
    backwards = [stage.backward.seconds for stage in model.stages]
    step = model.without_storage()
    predicted = step.seconds - step.optimizer - step.pipeline
    assert predicted == pytest.approx(play_1f1b(forwards, backwards, num))
    equal = play_1f1b([forwards[0]] * pipeline, [backwards[0]] * pipeline, num)
    assert equal == pytest.approx((num + pipeline - 1) * model.stages[0].seconds)


def test_interleaving_divides_the_bubble() -> None:
    """Narayanan et al. 2021, section 2.2.2."""
    plain, interleaved = (
        StepModel(
            config_of(train={"global_batch_size": 8}, parallel={"pipeline": 4, "virtual_pipeline": chunks}), H100
        ).step()
        for chunks in (1, 2)
    )
    assert interleaved.bubble == pytest.approx(plain.bubble / 2)
    assert interleaved.matrix == pytest.approx(plain.matrix)
    assert interleaved.pipeline > plain.pipeline


def test_a_large_product_is_bound_by_operations_and_a_thin_one_by_memory() -> None:
    rates = Rates(H100, GPU, 2)
    size = 16384
    best = 2 * size**3 / (H100.bf16_flops * H100.achievable_share * GPU.matrix_share)
    assert rates.product_seconds(size, size, size) == pytest.approx(best, rel=0.03)
    thin = 2 * size**2 / (H100.memory_bytes_per_second * GPU.memory_share)
    assert rates.product_seconds(1, size, size) == pytest.approx(thin + GPU.kernel_seconds, rel=0.01)


def test_collectives_follow_rings() -> None:
    rates = Rates(H100, GPU, 2)
    num_bytes = 10e9
    in_node = Group.of(8, 1, H100)
    assert (in_node.num_nodes, Group.of(16, 1, H100).num_nodes, Group.of(4, 8, H100).num_nodes) == (1, 2, 4)
    link = num_bytes * 7 / 8 / (H100.link_bytes_per_second * GPU.link_share)
    assert rates.gather_seconds(num_bytes, in_node) == pytest.approx(link, rel=0.01)
    assert rates.reduce_seconds(num_bytes, in_node) == 2 * rates.gather_seconds(num_bytes, in_node)
    one_adapter = num_bytes * 3 / 4 / (H100.network_bytes_per_second * GPU.network_share)
    assert rates.gather_seconds(num_bytes, Group.of(4, 8, H100)) == pytest.approx(one_adapter, rel=0.01)
    assert rates.gather_seconds(num_bytes, Group(1, 1)) == 0.0


def test_a_step_on_one_device_communicates_nothing_and_waits_for_nobody() -> None:
    step = StepModel(config_of(train={"global_batch_size": 2}), H100).step()
    assert (step.tensor, step.context, step.pipeline, step.bubble, step.data, step.recomputation) == (0,) * 6
    assert min(step.matrix, step.attention, step.memory_bound, step.optimizer) > 0


def test_full_recomputation_repeats_the_forward_pass_of_layers() -> None:
    none, full = (
        StepModel(config_of(train={"global_batch_size": 2, "recompute": recompute}), H100)
        for recompute in ("none", "full")
    )
    layers = 2 * 8 * none._layer(0).forward.seconds
    assert full.step().recomputation == pytest.approx(layers)
    assert full.step().seconds - none.step().seconds == pytest.approx(layers)


def test_an_offloaded_optimizer_is_bound_by_the_machine() -> None:
    stays, leaves = (
        StepModel(config_of(train={"global_batch_size": 2}, parallel={"offload": offload}), H100).without_storage()
        for offload in ("none", "optimizer")
    )
    assert leaves.optimizer > 10 * stays.optimizer
    assert leaves.seconds - stays.seconds == pytest.approx(leaves.optimizer - stays.optimizer)


def test_saves_are_spread_over_the_steps_between_them() -> None:
    often, seldom, waiting = (
        StepModel(config_of(checkpoint=checkpoint, train={"global_batch_size": 64}), H100).step()
        for checkpoint in ({"every_steps": 10}, {"every_steps": 100}, {"every_steps": 100, "asynchronous": False})
    )
    state = 12 * plan.num_parameters(config_of().model, padded=True)
    copied = state / 6e9 + state / H100.host_link_bytes_per_second
    assert often.checkpoint == pytest.approx(copied / 10)
    assert seldom.checkpoint == pytest.approx(copied / 100)
    written = 2 * state / H100.storage_bytes_per_second + state / H100.host_link_bytes_per_second
    assert waiting.checkpoint == pytest.approx(written / 100)
    with_snapshots = config_of(
        checkpoint={"every_steps": 100, "snapshot_every_steps": 10}, train={"global_batch_size": 64}
    )
    assert StepModel(with_snapshots, H100).step().checkpoint == pytest.approx(often.checkpoint)


def test_a_checkpoint_waits_for_the_one_before() -> None:
    step = StepModel(config_of(checkpoint={"every_steps": 1}, train={"global_batch_size": 1}), H100).step()
    state = 12 * plan.num_parameters(config_of().model, padded=True)
    written = 2 * state / H100.storage_bytes_per_second + state / H100.host_link_bytes_per_second
    copied = state / 6e9 + state / H100.host_link_bytes_per_second
    assert step.seconds == pytest.approx(copied + written)


def test_reading_costs_what_the_step_before_does_not_hide() -> None:
    """A machine has ranks of four replicas, each of 16 sequences of 2 bytes a token."""
    config = config_of(train={"global_batch_size": 128}, parallel={"tensor": 2, "data": 8})
    slow = H100.model_copy(update={"storage_bytes_per_second": 1e5})
    step = StepModel(config, slow).step()
    read = 4 * 16 * 2048 * 2 / 1e5
    assert step.input == pytest.approx(read - StepModel(config, slow).without_storage().seconds)
    assert StepModel(config, H100).step().input == 0
    assert StepModel(config, slow, Practice(uses_storage=False)).step().seconds < step.seconds - step.input


def test_what_a_practice_hides_costs_less() -> None:
    config = config_of(
        train={"global_batch_size": 16}, parallel={"tensor": 2, "sequence": True, "pipeline": 2, "data": 4}
    )
    open_step, hidden = (
        StepModel(config, H100, practice).step()
        for practice in (
            Practice(hides_tensor="nothing"),
            Practice(hides_tensor="all", hides_pipeline=True, hides_data=True),
        )
    )
    for part in ("tensor", "pipeline", "data"):
        assert 0 <= getattr(hidden, part) < getattr(open_step, part), part


LAYOUTS = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from([1, 2, 4, 8]),
        "pipeline": st.sampled_from([1, 2, 4]),
        "context": st.sampled_from([1, 2]),
        "data": st.sampled_from([1, 2, 8]),
        "zero": st.sampled_from([1, 2, 3]),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layout=LAYOUTS,
    recompute=st.sampled_from(["none", "selective", "full"]),
    window=st.sampled_from([None, 256]),
    cluster=st.sampled_from(["a100-80", "h100", "b200", "cpu"]),
)
def test_time_is_positive_in_every_part_and_grows_with_the_work(
    layout: dict[str, Any], recompute: str, window: int | None, cluster: str
) -> None:
    def seconds(num_layers: int = 8, seq_length: int = 2048, batch: int = 64) -> float:
        config = config_of(
            model={"num_layers": num_layers, "seq_length": seq_length, "attention_window": window},
            train={"global_batch_size": batch, "recompute": recompute},
            parallel=layout,
        )
        step = StepModel(config, load(cluster)).step()
        assert all(value >= 0 and math.isfinite(value) for value in astuple(step))
        assert math.fsum(astuple(step)) == pytest.approx(step.seconds)
        return step.seconds

    try:
        base = seconds()
    except UserError:
        assume(False)
    assert seconds(num_layers=16) > base
    assert seconds(seq_length=4096) > base
    assert seconds(batch=128) > base


def test_what_replicas_exchange_and_computation_hides_is_told_as_a_share() -> None:
    """Work enough to hide all of it, of which a share of time is lost all the same."""
    config = config_of(train={"global_batch_size": 64}, parallel={"data": 8})
    shown, hidden = (StepModel(config, H100, Practice(hides_data=hides)) for hides in (False, True))
    assert shown.hidden_share == 0
    assert hidden.hidden_share == pytest.approx(GPU.overlap_share)
    assert hidden.step().data == pytest.approx(shown.step().data * (1 - GPU.overlap_share))
    assert StepModel(config_of(train={"global_batch_size": 8}), H100).hidden_share is None
