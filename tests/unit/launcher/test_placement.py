from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.placement import Machine, Placement, check_beside, in_order, place, threads_per_rank
from launcher.sizing import service_config
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

LAPTOP = Machine({"CPU": 1.0, "memory": 8e9})
GPU_NODE = Machine({"CPU": 64.0, "GPU": 8.0})


def config(ranks: int = 4, **launch: object) -> RunConfig:
    return from_tree({"parallel": {"data": ranks}, "launch": launch})


def test_ranks_are_numbered_machine_by_machine() -> None:
    where = Placement(nodes=3, ranks_per_node=4, gpus_per_node=0)
    assert [list(where.ranks_of(node)) for node in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert where.num_ranks == 12


def test_a_laptop_may_hold_more_ranks_than_cores() -> None:
    where = place(config(ranks=8), [LAPTOP])
    assert where == Placement(nodes=1, ranks_per_node=8, gpus_per_node=0)
    assert where.bundle == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("device", "gpus"),
    [("cpu", 0), ("auto", 8), ("cuda", 8)],
)
def test_ranks_get_a_gpu_each_unless_told_otherwise(device: str, gpus: int) -> None:
    where = place(config(ranks=16, device=device, nodes=2), [GPU_NODE, GPU_NODE])
    assert where.gpus_per_node == gpus
    assert where.bundle.get("GPU", 0) == gpus


def test_machines_without_a_cpu_for_the_agent_do_not_count() -> None:
    head = Machine({"CPU": 0.0, "GPU": 0.0})
    assert place(config(ranks=8), [head, GPU_NODE]).nodes == 1
    with pytest.raises(UserError, match=r"launch.nodes 2 needs 2 machines .* has 1; set launch.nodes to 1"):
        place(config(ranks=16, nodes=2, device="cpu"), [head, GPU_NODE])


@pytest.mark.parametrize(
    ("ranks", "device", "machines", "has"),
    [
        (4, "cuda", [LAPTOP], "0 GPUs"),
        (4, "auto", [Machine({"CPU": 8.0, "GPU": 1.0})], "1 GPUs"),
        (16, "auto", [GPU_NODE], "8 GPUs"),
        (16, "cuda", [GPU_NODE, GPU_NODE, LAPTOP], "8, 8 and 0 GPUs"),
    ],
)
def test_too_few_gpus_are_refused_with_the_numbers(ranks: int, device: str, machines: list[Machine], has: str) -> None:
    with pytest.raises(UserError) as refusal:
        place(config(ranks=ranks, device=device), machines)
    assert f"{ranks} ranks per machine need {ranks} GPUs" in str(refusal.value)
    assert f"the cluster has {has};" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_machines_without_the_labels_do_not_count() -> None:
    kinds = ["H100", "H100", "A100"]
    machines = [Machine(GPU_NODE.resources, {"ray.io/accelerator-type": kind}) for kind in kinds]
    labels = {"ray.io/accelerator-type": "H100"}
    assert place(config(ranks=16, nodes=2, labels=labels), machines).nodes == 2
    with pytest.raises(UserError) as refusal:
        place(config(ranks=16, nodes=2, spares=1, labels=labels), machines)
    assert str(refusal.value).startswith(
        "launch.labels ray.io/accelerator-type=H100 are on 2 of 3 machines, and 3 are needed; the cluster has "
        "ray.io/accelerator-type=A100, ray.io/accelerator-type=H100; "
    )
    with pytest.raises(UserError, match="on 0 of 1 machines, and 1 are needed; the cluster has no such labels;"):
        place(config(labels=labels), [LAPTOP])


# ------------------------------------------------------------------------------------------------- near and far

ADDRESSES = ["10.0.0.9", "10.0.0.10", "10.0.0.2", "10.0.1.1", "10.0.1.2", "10.0.1.3"]


def racked(*racks: str) -> list[Machine]:
    return [
        Machine({}, {"rack": rack} if rack else {}, address, id=str(number))
        for number, (rack, address) in enumerate(zip(racks, ADDRESSES, strict=False))
    ]


def pipelined(pipeline: int, data: int, nodes: int, **launch: object) -> RunConfig:
    layers = {"num_layers": pipeline}
    return from_tree(
        {
            "model": layers,
            "parallel": {"pipeline": pipeline, "data": data},
            "train": {"global_batch_size": 12},
            "launch": {"nodes": nodes, "topology": ["rack"], **launch},
        }
    )


def test_machines_are_numbered_by_labels_and_then_by_address() -> None:
    machines = racked("b", "a", "b", "a")
    assert in_order(pipelined(1, 4, nodes=4), machines) == [1, 3, 2, 0]
    assert in_order(pipelined(1, 4, nodes=4, topology=["zone"]), machines) == [2, 0, 1, 3]  # 10 follows 9
    assert in_order(pipelined(1, 3, nodes=3, spares=1), machines) == [1, 3, 2, 0]  # the last is the spare


def test_stages_of_one_replica_are_neighbours() -> None:
    """Two stages of three machines: the n-th of either lie side by side, and ranks are numbered stage by stage."""
    run = pipelined(2, 3, nodes=6)
    order = in_order(run, racked(*"abcabc"))
    first, second = order[:3], order[3:]
    assert [{machine % 3 for machine in pair} for pair in zip(first, second, strict=True)] == [{0}, {1}, {2}]
    assert sorted(order) == list(range(6))


def test_stages_that_share_machines_are_left_where_they_are() -> None:
    assert in_order(pipelined(4, 1, nodes=2), racked("b", "a")) == [1, 0]


def test_machines_of_any_address_have_an_order() -> None:
    machines = [Machine({}, address=address, id=address) for address in ("head", "::1", "", "127.0.0.1")]
    assert in_order(pipelined(1, 4, nodes=4), machines) == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("ranks", "cores", "wanted", "threads"),
    [(4, 2, None, 1), (4, 16, None, 4), (4, 18, None, 4), (1, 2, None, 2), (4, 2, 3, 3)],
)
def test_ranks_share_the_cores_evenly(ranks: int, cores: int, wanted: int | None, threads: int) -> None:
    assert threads_per_rank(config(ranks=ranks, threads_per_rank=wanted), cores) == threads


# ------------------------------------------------------------------------------------------------------- a second job


def with_service(ranks: int, nodes: int, service_ranks: int, service_nodes: int = 1, spares: int = 0) -> RunConfig:
    return from_tree(
        {
            "parallel": {"data": ranks},
            "train": {"global_batch_size": ranks},
            "launch": {"nodes": nodes, "spares": spares, "device": "cuda"},
            "evaluation": {"where": "service", "data": service_ranks, "nodes": service_nodes},
        }
    )


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 4),
)
def test_the_service_is_refused_exactly_where_no_way_of_placing_both_exists(
    sizes: list[tuple[int, int]], nodes: int, gpus: int, service_nodes: int, service_gpus: int
) -> None:
    """Against every choice of machines for the one and the other."""
    run = with_service(gpus * nodes, nodes, service_gpus * service_nodes, service_nodes)
    machines = [Machine({"CPU": float(cpus), "GPU": float(count)}) for cpus, count in sizes]

    def fits(chosen: tuple[int, ...], others: tuple[int, ...]) -> bool:
        return all(
            sizes[each][0] >= (each in chosen) + (each in others)
            and sizes[each][1] >= gpus * (each in chosen) + service_gpus * (each in others)
            for each in range(len(sizes))
        )

    places = range(len(sizes))
    possible = any(
        fits(chosen, others) for chosen in combinations(places, nodes) for others in combinations(places, service_nodes)
    )
    try:
        check_beside(run, service_config(run), machines)
    except UserError:
        assert not possible
    else:
        assert possible


def test_what_the_service_lacks_is_said() -> None:
    run = with_service(ranks=8, nodes=1, service_ranks=4)
    with pytest.raises(UserError, match=r"whose ranks need 1 machine\(s\) with 4 GPUs beside the run's 1, .* has 1;"):
        check_beside(run, service_config(run), [GPU_NODE])
    check_beside(run, service_config(run), [GPU_NODE, GPU_NODE])


def test_the_service_has_a_layout_of_its_own() -> None:
    run = from_tree(
        {
            "model": {"num_heads": 8, "num_layers": 4},
            "parallel": {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2, "virtual_pipeline": 2, "data": 2},
            "train": {"global_batch_size": 64, "ramp_start_batch_size": 16, "ramp_tokens": 1000},
            "launch": {"nodes": 2, "spares": 1},
            "evaluation": {"where": "service", "pipeline": 1, "data": 3},
        }
    )
    layout = service_config(run).parallel
    assert (layout.tensor, layout.pipeline, layout.context, layout.data, layout.num_ranks) == (2, 1, 1, 3, 6)
    assert service_config(run).launch.nodes == 1 and service_config(run).launch.spares == 0
    wrong = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"tensor": 3})})
    with pytest.raises(UserError, match=r"the evaluation service cannot hold the model: .*parallel.tensor 3"):
        service_config(wrong)
