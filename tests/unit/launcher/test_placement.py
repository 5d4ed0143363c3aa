import pytest

from launcher.placement import Placement, place, threads_per_rank
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

LAPTOP = {"CPU": 1.0, "memory": 8e9}
GPU_NODE = {"CPU": 64.0, "GPU": 8.0}


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
    head = {"CPU": 0.0, "GPU": 0.0}
    assert place(config(ranks=8), [head, GPU_NODE]).nodes == 1
    with pytest.raises(UserError, match=r"launch.nodes 2 needs 2 machines .* has 1; set launch.nodes to 1"):
        place(config(ranks=16, nodes=2, device="cpu"), [head, GPU_NODE])


@pytest.mark.parametrize(
    ("ranks", "device", "machines", "has"),
    [
        (4, "cuda", [LAPTOP], "0 GPUs"),
        (4, "auto", [{"CPU": 8.0, "GPU": 1.0}], "1 GPUs"),
        (16, "auto", [GPU_NODE], "8 GPUs"),
        (16, "cuda", [GPU_NODE, GPU_NODE, LAPTOP], "8, 8 and 0 GPUs"),
    ],
)
def test_too_few_gpus_are_refused_with_the_numbers(
    ranks: int, device: str, machines: list[dict[str, float]], has: str
) -> None:
    with pytest.raises(UserError) as refusal:
        place(config(ranks=ranks, device=device), machines)
    assert f"{ranks} ranks per machine need {ranks} GPUs" in str(refusal.value)
    assert f"the cluster has {has};" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("ranks", "cores", "wanted", "threads"),
    [(4, 2, None, 1), (4, 16, None, 4), (4, 18, None, 4), (1, 2, None, 2), (4, 2, 3, 3)],
)
def test_ranks_share_the_cores_evenly(ranks: int, cores: int, wanted: int | None, threads: int) -> None:
    assert threads_per_rank(config(ranks=ranks, threads_per_rank=wanted), cores) == threads
