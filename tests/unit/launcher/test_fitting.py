"""A run is refused where machines cannot hold it, by what its plan says, and by nothing else."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher import fitting, memory
from launcher.fitting import check_memory, least_bytes
from launcher.placement import ACCELERATOR, Machine
from launcher.planning.cluster import load
from launcher.planning.planner import make_plan
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree, override
from trainer.plan import num_parameters

BILLION = {"hidden_size": 2048, "num_layers": 16, "num_heads": 16}
"""Of parameters, a little less; its state takes 18 bytes each in bf16."""
GIB = 2**30


def large(zero: int = 1, nodes: int = 1, **sections: dict[str, object]) -> RunConfig:
    launch = {"nodes": nodes, "device": "cpu", **sections.pop("launch", {})}
    return from_tree({"model": BILLION, "parallel": {"data": 4, "zero": zero}, "launch": launch, **sections})


def on_cpus(num_bytes: float) -> Machine:
    return Machine({"CPU": 2.0, "memory": num_bytes})


def with_gpus(name: str, num_bytes: float = 2000e9) -> Machine:
    return Machine({"CPU": 8.0, "GPU": 8.0, "memory": num_bytes}, {ACCELERATOR: name})


def refusal(config: RunConfig, *machines: Machine) -> str:
    with pytest.raises(UserError) as refused:
        check_memory(config, machines)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------------------- on CPUs


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_on_cpus_share_a_machine_with_snapshots(nodes: int) -> None:
    """What `broadgauge plan` says of a rank, for each on a machine; and two copies of its share of a checkpoint."""
    run = large(nodes=nodes)
    rank = make_plan(run, load("cpu")).memory
    need = 4 / nodes * rank.total + 2 * 12 * num_parameters(run.model, padded=True) / nodes
    assert least_bytes(run, on_gpus=False) == pytest.approx(need)
    check_memory(run, [on_cpus(1.001 * need)] * nodes)
    told = refusal(run, *[on_cpus(0.999 * need)] * nodes)
    assert f"{4 // nodes} rank(s) take {need / GIB:.1f} GiB of memory on each of {nodes} machine(s) (" in told
    assert f"optimizer {4 / nodes * rank.optimizer / GIB:.1f}" in told and "snapshots" in told and "weights" in told
    assert f"there are {', '.join([f'{0.999 * need / GIB:.1f}'] * nodes)} GiB; try train.recompute=selective" in told
    assert "parallel.zero=2" in told and "`broadgauge plan CONFIG --search`" in told and "--force" in told


def test_what_takes_cpus_by_itself_needs_as_much_as_what_asks_for_them() -> None:
    """Kernels of a CPU keep more than a GPU's."""
    model = {**BILLION, "dropout": 0.1, "attention_window": 256}
    asks, takes = (from_tree({"model": model, "launch": {"device": device}}) for device in ("cpu", "auto"))
    assert least_bytes(takes, on_gpus=False) == least_bytes(asks, on_gpus=False)


def test_stages_that_hold_little_make_room_for_those_that_hold_much() -> None:
    """The last stage has the logits: taken for all four ranks they would be counted four times."""
    model = {**BILLION, "num_layers": 4, "vocab_size": 200000}
    run = from_tree({"model": model, "parallel": {"pipeline": 4}, "launch": {"device": "cpu"}})
    fullest = make_plan(run, load("cpu")).memory.total
    assert least_bytes(run, on_gpus=False) < 4 * fullest + memory.snapshots_bytes(run)


def test_spares_must_hold_as_much_and_what_is_not_counted_is_enough() -> None:
    little, enough = on_cpus(8e9), on_cpus(150e9)
    check_memory(large(), [little, enough])
    assert "on each of 2 machine(s)" in refusal(large(launch={"spares": 1}), little, enough)
    check_memory(large(), [Machine({"CPU": 2.0})])


def test_snapshots_on_disk_take_no_memory() -> None:
    on_disk = large(checkpoint={"snapshots_in": "/scratch/snapshots"})
    machine = on_cpus(least_bytes(on_disk, on_gpus=False))
    check_memory(on_disk, [machine])
    assert "snapshots" in refusal(large(), machine)


# ------------------------------------------------------------------------------------------------------------- on GPUs


def on_gpus(**launch: object) -> RunConfig:
    return large(launch={"device": "cuda", **launch}, train={"micro_batch_size": 64})


def test_the_fullest_rank_must_fit_its_device() -> None:
    plan = make_plan(on_gpus(), load("h100"))
    assert not plan.fits and make_plan(on_gpus(), load("b200")).fits
    for machine, launch in ((with_gpus("H100"), {}), (with_gpus("anything"), {"cluster": "h100"})):
        told = refusal(on_gpus(**launch), machine)
        assert f"the fullest rank takes {plan.memory.total / GIB:.1f} GiB (activations " in told
        assert (
            f"each H100 80GB SXM has {plan.cluster.memory_bytes / GIB:.1f} GiB; try " in told
            and "train.micro_batch_size=32" in told
        )
    check_memory(on_gpus(), [with_gpus("NVIDIA B200")])


def test_following_the_advice_ends_at_a_run_that_fits() -> None:
    run = on_gpus()
    for _ in range(10):
        heard: list[str] = []
        check_memory(run, [with_gpus("H100")], heard.append)
        if not heard:
            break
        (told,) = heard
        run = override(run.model_dump(mode="json"), re.findall(r"\w+\.\w+=\w+", told)[:1])
    assert not heard and run != on_gpus()


def test_a_device_of_which_nothing_is_known_refuses_nothing() -> None:
    check_memory(on_gpus(), [with_gpus("NVIDIA L4")])
    check_memory(on_gpus(), [with_gpus("H100 PCIe")])  # which does less than the one that comes along
    check_memory(on_gpus(nodes=2), [with_gpus("H100"), with_gpus("L4")])


def test_a_head_without_gpus_does_not_hide_what_the_others_are() -> None:
    assert "H100" in refusal(on_gpus(), Machine({"CPU": 4.0, "memory": 1e9}), with_gpus("H100"))


def test_the_machine_must_hold_what_devices_do_not() -> None:
    small = large(launch={"device": "cuda"})
    snapshot = 12 * num_parameters(small.model, padded=True)
    check_memory(small, [with_gpus("H100", 1.001 * snapshot)])
    assert "offloaded state and a snapshot" in refusal(small, with_gpus("H100", 0.999 * snapshot))


# ----------------------------------------------------------------------------------------------- what a plan may not do


@pytest.mark.parametrize("machine", [on_cpus(1e12), with_gpus("H100")])
def test_a_cluster_that_is_not_there_is_refused_at_once(machine: Machine, tmp_path: Path) -> None:
    device = "cuda" if "GPU" in machine.resources else "cpu"
    for wrong, told in (("h10", "did you mean h100?"), (str(tmp_path / "mine.yaml"), "No such file")):
        assert told in refusal(large(launch={"cluster": wrong, "device": device}), machine)
    assert "launch.cluster: unknown key devise" in refusal(
        large(launch={"cluster": {"devise": "X"}, "device": device}), machine
    )


def test_a_config_for_gpus_may_be_tried_on_cpus() -> None:
    check_memory(large(launch={"cluster": "h100"}), [on_cpus(1e12)])
    assert "rank(s) take" in refusal(large(launch={"cluster": "h100"}), on_cpus(1e9))


def test_a_fault_of_the_planner_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Mapping[str, float]:
        raise ZeroDivisionError

    monkeypatch.setattr(fitting, "rank_memory", broken)
    check_memory(large(), [on_cpus(1.0)])


def test_who_forces_is_warned() -> None:
    heard: list[str] = []
    check_memory(large(), [on_cpus(1e9)], heard.append)
    (told,) = heard
    assert "rank(s) take" in told and "--force" not in told
