"""Times of a step against closed forms, and what must grow with the work; test_timeline.py plays schedules through."""

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


def config_of(**sections: Any) -> RunConfig:
    model = {"num_layers": 8, "hidden_size": 1024, "num_heads": 16, "seq_length": 2048} | sections.pop("model", {})
    return from_tree({"model": model, "launch": {"device": "cuda"}, **sections})


def step_seconds(config: RunConfig, cluster: Cluster = H100, practice: Practice | None = None) -> float:
    return StepModel(config, cluster, practice or Practice()).step().seconds


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


@pytest.mark.parametrize(("zero", "moved"), [(1, 4 + 4 + 2), (2, 4 + 4 + 2), (3, 4 + 2 + 2)])
def test_replicas_move_what_their_zero_stage_does(zero: int, moved: int) -> None:
    """Bytes of a weight around a ring of 16 with an adapter each: DeepSpeed sums everywhere up to its second stage."""
    config = config_of(train={"global_batch_size": 16}, parallel={"tensor": 8, "data": 16, "zero": zero})
    num_bytes = moved * plan.parameters_per_rank(config) * 15 / 16
    step = StepModel(config, H100).step()
    assert step.data == pytest.approx(num_bytes / (H100.network_bytes_per_second * GPU.network_share), rel=0.05)
    scattered = StepModel(config, H100, Practice(scatters_gradients=True)).step()
    assert scattered.data == pytest.approx(step.data * (6 / 10 if zero < 3 else 1), rel=0.05)


def test_stages_sum_the_gradient_of_an_embedding_that_two_of_them_hold() -> None:
    """Two ranks exchange as much as each has, in fp32."""
    tied, untied = (
        StepModel(
            config_of(
                model={"tied_embeddings": tied, "vocab_size": 51200},
                train={"global_batch_size": 8},
                parallel={"tensor": 8, "pipeline": 4},
            ),
            H100,
        ).step()
        for tied in (True, False)
    )
    sent = 4 * 51200 * 1024 / 8 / (H100.network_bytes_per_second * GPU.network_share)
    assert tied.pipeline - untied.pipeline == pytest.approx(sent, rel=0.1)


@pytest.mark.parametrize(("recompute", "times"), [("none", 2), ("selective", 3), ("full", 3)])
def test_recomputed_attention_trades_its_heads_once_more(recompute: str, times: int) -> None:
    """Forward, backward, and again: core attention is recomputed with the exchanges of its context-parallel ranks."""
    config = config_of(
        train={"global_batch_size": 4, "recompute": recompute}, parallel={"tensor": 2, "context": 4, "data": 2}
    )
    passes = StepModel(config, H100)._layer(0)
    once = passes.forward.context
    assert once > 0
    assert sum(each.context for each in (passes.forward, passes.backward, passes.repeated)) == pytest.approx(
        times * once
    )


def test_heads_cross_the_links_and_are_copied_on_either_side() -> None:
    """16 query, 16 key, 16 value and 16 result heads of 64 in bf16 for 512 tokens; five passes through memory."""
    layer = StepModel(config_of(train={"global_batch_size": 4}, parallel={"context": 4}), H100)._layer(0)
    num_bytes = 4 * 16 * 64 * 2 * 512
    crossing = num_bytes * 3 / 4 / (H100.link_bytes_per_second * GPU.link_share)
    copying = 5 * num_bytes / (H100.memory_bytes_per_second * GPU.memory_share)
    latency = 4 * (H100.link_latency_seconds + GPU.kernel_seconds) + 12 * GPU.kernel_seconds
    assert layer.forward.context == pytest.approx(crossing + copying + latency)


@pytest.mark.parametrize(
    ("model", "forward", "backward"),
    [
        # biases of 9 h results, read and written, and summed backwards; two dropouts
        ({"biases": "all", "dropout": 0.1}, 2 * (9 + 2) * 1024, 9 * 1024),
        ({"biases": "none"}, 0, 0),
        # 4 reads and 3 writes of f where a fused gate has 2 and 1; backwards 12 where that has 4.5
        ({"biases": "none", "activation": "swiglu", "ffn_hidden_size": 2816}, 4 * 2816, 7.5 * 2816),
    ],
)
def test_kernels_apart_move_more(model: dict[str, Any], forward: float, backward: float) -> None:
    config = config_of(model=model, train={"global_batch_size": 2})
    apart, fused = (StepModel(config, H100, Practice(fuses_pointwise=fuses))._layer(0) for fuses in (False, True))
    rate = H100.memory_bytes_per_second * GPU.memory_share
    for name, elements in (("forward", forward), ("backward", backward)):
        more = getattr(apart, name).memory - getattr(fused, name).memory
        assert more == pytest.approx(2048 * 2 * elements / rate, abs=8 * GPU.kernel_seconds)


def test_the_loss_goes_over_logits_as_often_as_its_kernels_do() -> None:
    config = config_of(model={"vocab_size": 51200}, train={"global_batch_size": 2})
    ours, published = (StepModel(config, H100, Practice(loss_bytes=num))._output() for num in (66.0, 44.0))
    moved = 22 * 2048 * 51200 / (H100.memory_bytes_per_second * GPU.memory_share)
    assert ours.seconds - published.seconds == pytest.approx(moved)
    assert ours == StepModel(config, H100)._output()


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
