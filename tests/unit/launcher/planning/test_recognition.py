"""A run's cluster is what its config says, or what its devices are called; on CPUs, this machine."""

import pytest

from launcher.planning.cluster import load
from launcher.planning.recognition import cluster_of, known_by
from launcher.planning.this_machine import cpu_cluster
from trainer.config_file import from_tree


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("A100-80G", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("A100", None),  # of either memory
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L4", None),
        ("", None),
    ],
)
def test_devices_are_known_by_their_names(device: str, name: str | None) -> None:
    assert known_by(device) == name


def test_what_the_config_says_counts_where_it_is_of_the_kind_that_computes() -> None:
    said = from_tree({"launch": {"cluster": "b200"}})
    assert cluster_of(said, ["NVIDIA H100 80GB HBM3"], on_gpus=True) == load("b200")
    assert cluster_of(said, [], on_gpus=False) == cpu_cluster(1)
    own = load("cpu").model_dump(exclude_none=True) | {"device": "mine"}
    told = cluster_of(from_tree({"launch": {"cluster": own}}), [], on_gpus=False)
    assert told is not None and told.device == "mine"


def test_machines_that_differ_are_no_cluster() -> None:
    plain = from_tree({})
    assert cluster_of(plain, ["H100", "NVIDIA H100 80GB HBM3"], on_gpus=True) == load("h100")
    assert cluster_of(plain, ["H100", "H200"], on_gpus=True) is None
    assert cluster_of(plain, [], on_gpus=True) is None


def test_ranks_share_this_machine() -> None:
    run = from_tree({"parallel": {"data": 4}, "launch": {"threads_per_rank": 1}})
    assert cluster_of(run, [], on_gpus=False) == cpu_cluster(4, 1)
