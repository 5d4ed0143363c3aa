"""A run's time: every step of its ramp, the layouts that supervision would choose, what spares and snapshots do."""

from typing import Any

import pytest

from launcher import sizing
from launcher.planning.cluster import Cluster, load
from launcher.planning.planner import Plan, make_plan
from trainer.config import RunConfig
from trainer.config_file import from_tree
from trainer.schedule import Schedule

H100 = load("h100")


def config_of(**sections: Any) -> RunConfig:
    train = {"total_tokens": "10B", "global_batch_size": 256} | sections.pop("train", {})
    parallel = {"tensor": 4, "data": 32, "sequence": True} | sections.pop("parallel", {})
    launch = {"nodes": 16} | sections.pop("launch", {})
    return from_tree(
        {
            "model": {"num_layers": 16, "hidden_size": 4096, "num_heads": 32},
            "train": train,
            "parallel": parallel,
            "launch": launch,
            **sections,
        }
    )


def plan_of(cluster: Cluster = H100, **sections: Any) -> Plan:
    return make_plan(config_of(**sections), cluster)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_ramp_takes_as_long_as_its_steps(zero: int) -> None:
    train = {"total_tokens": "2B", "ramp_start_batch_size": 32, "ramp_tokens": "1B"}
    plan = plan_of(train=train, parallel={"zero": zero})
    sizes = [Schedule(plan.config).step_after(done).batch_size for done in range(Schedule(plan.config).num_steps)]
    assert len(set(sizes)) == 8
    seconds = {}
    for size in set(sizes):
        step = plan_of(train={"global_batch_size": size}, parallel={"zero": zero}).step
        seconds[size] = step.seconds - step.checkpoint + plan.step.checkpoint
    assert plan.seconds == pytest.approx(sum(seconds[size] for size in sizes), rel=1e-6)


def test_without_a_ramp_it_is_steps_times_step() -> None:
    plan = plan_of()
    assert plan.seconds == pytest.approx(Schedule(plan.config).num_steps * plan.step.seconds)


@pytest.mark.parametrize(
    ("parallel", "train", "min_nodes"),
    [
        ({}, {}, None),
        ({"tensor": 8, "data": 16}, {}, None),
        ({"tensor": 8, "data": 16}, {"global_batch_size": 240 * 7}, 5),
        ({"tensor": 8, "pipeline": 4, "data": 4}, {}, None),
    ],
)
def test_a_run_shrinks_to_the_layouts_of_supervision(
    parallel: dict[str, int], train: dict[str, int], min_nodes: int | None
) -> None:
    config = config_of(parallel=parallel, train=train, supervise={"min_nodes": min_nodes})
    found = make_plan(config, H100).wall.sizes
    supervised = sizing.sizes(config)
    for missing, size in enumerate(found):
        fits = [nodes for nodes in supervised if nodes <= 16 - missing]
        assert size.num_nodes == max(fits, default=0), missing
        assert size.speed == (supervised[max(fits)].parallel.data / config.parallel.data if fits else 0)
    assert len(found) > 16 - min(supervised)


def test_a_cpu_box_fails_only_where_its_rate_is_said() -> None:
    cpu = load("cpu")
    silent, said = (plan_of(cluster) for cluster in (cpu, cpu.model_copy(update={"node_mtbf_hours": 1000.0})))
    assert silent.wall.as_tree() is None and silent.expected_seconds == silent.seconds
    assert said.expected_seconds > said.seconds


def test_machines_of_more_devices_fail_more_often_by_default() -> None:
    """50,700 hours a GPU: Grattafiori et al. 2024, section 3.3.4."""
    assert plan_of().wall.seconds_between_failures == pytest.approx(50_700 * 3600 / 128, rel=1e-3)


def test_spares_and_snapshots_do_what_is_said_of_them() -> None:
    bare = plan_of()
    spared = plan_of(launch={"spares": 1})
    assert bare.wall.goodput < bare.wall.goodput_with(1) == pytest.approx(spared.wall.goodput)
    assert spared.wall.goodput_with(0) == pytest.approx(bare.wall.goodput)
    assert spared.device_hours * 3600 == pytest.approx((128 + 8) * spared.expected_seconds)
    seldom = plan_of(launch={"spares": 1}, checkpoint={"every_steps": 50_000})
    snapshots = {"every_steps": 50_000, "snapshot_every_steps": 1000, "replicate": True}
    kept = plan_of(launch={"spares": 1}, checkpoint=snapshots)
    assert kept.wall.goodput > seldom.wall.goodput
    assert kept.wall.goodput_without_snapshots == pytest.approx(seldom.wall.goodput)


def test_expected_time_is_work_over_goodput() -> None:
    plan = plan_of()
    working = plan.seconds * (1 - plan.step.checkpoint / plan.step.seconds)
    assert plan.expected_seconds == pytest.approx(working / plan.wall.goodput)


def test_the_checkpoint_interval_may_be_a_time() -> None:
    by_steps = plan_of(checkpoint={"every_steps": 100})
    by_time = plan_of(checkpoint={"every_seconds": 100 * (by_steps.step.seconds - by_steps.step.checkpoint)})
    assert by_time.wall.interval_steps == 100
    assert by_time.wall.goodput == pytest.approx(by_steps.wall.goodput)
    late = plan_of(checkpoint={"every_seconds": 1.2 * (by_steps.step.seconds - by_steps.step.checkpoint)})
    assert late.wall.interval_steps == 2  # the first step to end after that time
    assert late.expected_seconds > late.seconds
    automatic, best = plan_of(checkpoint={"every_seconds": "auto"}).wall, by_steps.wall
    assert automatic.interval_steps == pytest.approx(best.best_interval_steps, rel=0.5)
    assert automatic.goodput == pytest.approx(best.best_goodput, rel=0.002)
