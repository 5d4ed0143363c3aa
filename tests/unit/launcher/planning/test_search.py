"""A search finds every layout that the trainer accepts, ranks them as plans do, and says what is worse about others."""

import time
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from launcher.planning import layout_space, search
from launcher.planning.cluster import Cluster, load
from launcher.planning.layout_space import Layout, layouts, on_devices
from launcher.planning.planner import make_plan
from launcher.planning.practice import Practice
from launcher.planning.rank_memory import fullest, rank_memory
from launcher.planning.search import Search
from launcher.planning.shared import Shared
from launcher.planning.step_time import StepModel
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

H100 = load("h100")
SMALL_NODES = H100.model_copy(update={"devices_per_node": 2, "memory_bytes": 3.0e9})
TIGHT = {
    "model": {"num_layers": 6, "hidden_size": 1536, "num_heads": 12, "seq_length": 1024, "attention_window": 256},
    "train": {"global_batch_size": 8, "recompute": "full"},
    "parallel": {"tensor": 2, "pipeline": 2, "sequence": True},
}
"""On 4 devices of 3 GB, of which about half of the layouts have too little."""


def by_trainer(tree: dict[str, dict[str, object]], num_devices: int, most_sequences: int) -> dict[Layout, RunConfig]:
    """Every layout that fills the devices and that the trainer accepts, by asking it about all combinations."""
    counts = [each for each in range(1, num_devices + 1) if num_devices % each == 0]
    grids = [
        (tensor, pipeline, context, num_devices // (tensor * pipeline * context))
        for tensor, pipeline, context in product(counts, counts, counts)
        if num_devices % (tensor * pipeline * context) == 0
    ]
    accepted = {}
    for grid, chunks, size, sequence in product(grids, range(1, 7), range(1, most_sequences + 1), (False, True)):
        layout = Layout(*grid, chunks, size, sequence, 1, "none", "none")
        try:
            config = from_tree(
                tree
                | {
                    "parallel": dict(zip(("tensor", "pipeline", "context", "data"), grid, strict=True))
                    | {"virtual_pipeline": chunks, "sequence": sequence},
                    "train": tree["train"] | {"micro_batch_size": size},
                }
            )
        except UserError:
            continue
        for zero, offload, recompute in product((1, 2, 3), ("none", "optimizer"), ("none", "selective", "full")):
            each = Layout(*layout[:7], zero, offload, recompute)
            accepted[each] = each.applied(config)
    return accepted


@pytest.fixture(scope="module")
def tight() -> Search:
    return search.search(from_tree(TIGHT), SMALL_NODES, num_best=1000)


@pytest.fixture(scope="module")
def big() -> tuple[Search, float]:
    """GPT-3 on 1,024 devices, and the seconds of a processor that finding it takes."""
    config = from_tree(
        {
            "preset": "gpt3_175b",
            "parallel": {"tensor": 8, "pipeline": 8, "data": 16, "sequence": True},
            "train": {"recompute": "selective"},
        }
    )
    before = time.process_time()
    found = search.search(config, H100)
    return found, time.process_time() - before


def test_no_layout_that_the_trainer_accepts_is_missing(tight: Search) -> None:
    """But those whose tensor-parallel ranks are on two machines, and ZeRO with nothing to split over."""
    config = on_devices(from_tree(TIGHT), SMALL_NODES, 4)
    accepted = by_trainer(TIGHT, 4, 8)
    within = {each for each in accepted if each.tensor <= 2 and (each.data * each.context > 1 or each.zero == 1)}
    assert set(layouts(config, SMALL_NODES, 4)) == within
    assert len({each.grid for each in within}) == 8 and tight.num_layouts == len(within)

    found = {Layout.of(plan.config): plan for plan in tight.best}
    plans = [(layout, make_plan(accepted[layout], SMALL_NODES)) for layout in sorted(within)[::3]]
    fitting = [(layout, plan) for layout, plan in plans if plan.fits]
    assert 0.1 < len(fitting) / len(plans) < 0.9
    of_grids = {layout.grid: plan.step.seconds for layout, plan in found.items()}
    assert all(of_grids[layout.grid] <= plan.step.seconds * (1 + 1e-9) for layout, plan in fitting)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_candidates_are_as_plans_have_them(precision: str) -> None:
    tree = TIGHT | {"train": {"global_batch_size": 8, "precision": precision}}
    config = on_devices(from_tree(tree), SMALL_NODES, 4)
    some = list(layouts(config, SMALL_NODES, 4))[::11]
    for layout, candidate in search.evaluated(config, SMALL_NODES, some):
        plan = make_plan(layout.applied(config), SMALL_NODES)
        assert candidate.memory_bytes == pytest.approx(plan.memory.total, rel=1e-12)
        assert (candidate.step_seconds < float("inf")) == plan.fits
        if plan.fits:
            assert candidate.step_seconds == pytest.approx(plan.step.seconds, rel=1e-12)


def test_results_are_not_shared_with_other_models_clusters_or_practices() -> None:
    model = StepModel(from_tree(TIGHT), H100)
    model.step()
    others: tuple[dict[str, Any], ...] = (
        {"cluster": SMALL_NODES},
        {"practice": Practice(hides_pipeline=True)},
        {"config": from_tree({**TIGHT, "model": {**TIGHT["model"], "num_layers": 12}})},
    )
    for other in others:
        with pytest.raises(AssertionError, match="begin with a new Shared"):
            replace(model, **other)
        assert replace(model, **other, shared=Shared()).step() != model.step()


def test_every_layout_of_the_list_is_one_that_the_trainer_reads(tight: Search, big: tuple[Search, float]) -> None:
    for found in (tight, big[0]):
        for plan in found.best:
            tree = found.config.model_dump(mode="json")
            for key, value in search.settings(found.config, plan).items():
                section, _, name = key.partition(".")
                tree[section][name] = value
            again = from_tree(tree)
            assert (again.parallel, again.train) == (plan.config.parallel, plan.config.train)


def test_the_list_has_a_row_for_a_grid_and_is_in_order(tight: Search) -> None:
    seconds = [plan.step.seconds for plan in tight.best]
    grids = [Layout.of(plan.config).grid for plan in tight.best]
    assert seconds == sorted(seconds) and len(set(grids)) == len(grids) > 3
    assert all(plan.fits and plan.num_devices == 4 for plan in tight.best)


def test_175b_on_1024_is_planned_at_least_as_fast_as_published(big: tuple[Search, float]) -> None:
    """Megatron's layouts: tensor 8 x pipeline 16 interleaved in 3 chunks (Narayanan et al. 2021), and others near."""
    found, _ = big
    best = found.best[0]
    assert best.fits and best.num_devices == 1024
    assert best.config.parallel.tensor <= H100.devices_per_node
    assert found.own is not None and found.own.rank is not None and found.own.rank > 1
    for pipeline, size, recompute in product((8, 16), (1, 2), ("none", "selective", "full")):
        data = 128 // pipeline
        if data * size > 16:
            continue  # the first batch of the ramp has 16 sequences
        published = from_tree(
            {
                "preset": "gpt3_175b",
                "parallel": {"tensor": 8, "pipeline": pipeline, "data": data, "sequence": True},
                "train": {"micro_batch_size": size, "recompute": recompute},
            }
        )
        assert best.step.seconds <= make_plan(published, H100).step.seconds


def test_175b_on_1024_takes_less_than_10_seconds_of_a_processor(big: tuple[Search, float]) -> None:
    found, seconds = big
    assert found.num_layouts > 4000 and seconds < 10


def test_what_a_ramp_rules_out_is_told(big: tuple[Search, float]) -> None:
    found, _ = big
    free = found.without_ramp
    assert free is not None and free.slower < -0.05 and free.other.fits
    parallel = free.other.config.parallel
    assert 16 % (free.other.config.train.micro_batch_size * parallel.data * parallel.pipeline)


def test_reasons_are_the_differences_of_plans(tight: Search) -> None:
    assert len(tight.reasons) > 4
    for each in tight.reasons:
        assert each.best is tight.best[0] and each.settings
        assert sum(change.more for change in each.seconds) == pytest.approx(
            each.slower * each.best.step.seconds, abs=1e-12
        )
        assert each.slower > -1e-12 or each.missing_bytes > 0  # else it would be the best
        assert each.missing_bytes == pytest.approx(
            max(0.0, fullest(each.other.config, SMALL_NODES).memory.total - SMALL_NODES.memory_bytes)
        )
    assert {"tensor", "pipeline", "micro_batch_size", "recompute"} <= {
        name for each in tight.reasons for name in each.settings
    }


def test_the_own_layout_is_ranked_among_all(tight: Search) -> None:
    config = on_devices(from_tree(TIGHT), SMALL_NODES, 4)
    assert tight.own is not None
    own = tight.own.plan.step.seconds
    faster = [
        layout
        for layout, each in search.evaluated(config, SMALL_NODES, layouts(config, SMALL_NODES, 4))
        if each.step_seconds < own * (1 - 1e-12)
    ]
    assert tight.own.rank == len(faster) + 1


def test_where_nothing_fits_the_nearest_is_told_and_what_would_do() -> None:
    cluster = H100.model_copy(update={"memory_bytes": 2.6e9})
    found = search.search(from_tree(TIGHT), cluster, 1)
    assert not found.best and found.num_layouts and found.shortage is not None
    nearest, enough = found.shortage.nearest, found.shortage.enough_devices
    assert nearest.free_bytes < 0 and enough is not None
    assert search.search(from_tree(TIGHT), cluster, enough).best
    assert not search.search(from_tree(TIGHT), cluster, enough // 2).best
    placed = on_devices(from_tree(TIGHT), cluster, 1)
    memory = [fullest(each.applied(placed), cluster).memory.total for each in layouts(placed, cluster, 1)]
    assert nearest.memory.total == pytest.approx(min(memory))


def test_where_no_layout_fills_the_devices_others_are_named() -> None:
    found = search.search(from_tree(TIGHT), SMALL_NODES, 7)
    assert found.num_layouts == 0 and found.possible_devices == [6, 8]


def test_other_devices_take_as_many_machines() -> None:
    found = search.search(from_tree(TIGHT | {"launch": {"nodes": 2}}), SMALL_NODES, 8)
    assert found.own is None and found.best
    assert search.settings(found.config, found.best[0])["launch.nodes"] == 4


def test_more_ranks_than_a_machine_has_devices_are_spread() -> None:
    found = search.search(from_tree(TIGHT | {"launch": {"nodes": 1}}), SMALL_NODES)
    assert search.settings(found.config, found.best[0])["launch.nodes"] == 2


def test_machines_of_cpus_offload_nothing() -> None:
    cpu = load("cpu")
    config = on_devices(from_tree(TIGHT), cpu, 4)
    assert {each.offload for each in layouts(config, cpu, 4)} == {"none"}


@pytest.mark.parametrize("cluster", [H100, load("cpu")], ids=["cuda", "cpu"])
@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_fullest_of_all_stages_is_found_among_few(cluster: Cluster, window: int | None, chunks: int) -> None:
    """Few micro-batches and a small vocabulary leave stages apart by their layers alone, of which some are banded."""
    model = {"num_layers": 24, "hidden_size": 512, "num_heads": 8, "attention_window": window, "dropout": 0.1}
    model["vocab_size"] = 128
    found_at = set()
    for pipeline, data, recompute in product((1, 2, 4, 8), (1, 2, 16), ("none", "selective", "full")):
        if chunks > 1 and pipeline == 1:
            continue
        parallel = {"pipeline": pipeline, "data": data, "virtual_pipeline": chunks}
        train = {"global_batch_size": 8 * data, "recompute": recompute}
        config = on_devices(from_tree({"model": model, "parallel": parallel, "train": train}), cluster, pipeline * data)
        totals = [rank_memory(config, cluster, stage).total for stage in range(pipeline)]
        found = fullest(config, cluster)
        assert (found.stage, found.memory.total) == (totals.index(max(totals)), max(totals))
        found_at.add(found.stage)
    keeps_more_in_bands = window and cluster.kind == "cuda"
    assert found_at == ({0, 1} if keeps_more_in_bands and chunks > 1 else {0})


def test_a_stage_takes_as_long_as_its_layers_one_by_one() -> None:
    config = from_tree(TIGHT | {"parallel": {"pipeline": 2, "virtual_pipeline": 3}})
    model = StepModel(config, H100)
    kinds = model._layer(0), model._layer(1)
    ends = model._embedding(), model._output()
    for stage in (0, 1):  # chunks of one layer: those of a stage are all of one kind
        one_by_one = sum((kinds[stage] for _ in range(3)), ends[stage])
        assert model.stages[stage].seconds == pytest.approx(one_by_one.seconds, rel=1e-12)


def test_micro_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = on_devices(from_tree(TIGHT), H100, 1)
    assert {each.micro_batch_size for each in layouts(config, H100, 1)} == {1, 2, 4, 8}
    monkeypatch.setattr(layout_space, "MOST_SEQUENCES", 4)
    assert {each.micro_batch_size for each in layouts(config, H100, 1)} == {1, 2, 4}
