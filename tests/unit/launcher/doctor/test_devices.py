"""GPUs and cores, by a made-up `nvidia-smi` where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.doctor.checks import devices, driver, nvidia_smi
from launcher.doctor.checks.devices import Devices, judge
from trainer.config import RunConfig, UserError
from trainer.config_file import from_tree

H100 = "NVIDIA H100 80GB HBM3"
Install = Callable[[str], None]


def config(ranks: int, device: str = "auto") -> RunConfig:
    return from_tree({"parallel": {"data": ranks}, "launch": {"device": device}})


@pytest.fixture
def nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    def install(script: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_ranks_on_gpus_need_one_each() -> None:
    machine = Devices(cores=16, gpus=(H100,) * 8)
    assert judge(machine, None).measured == "16 cores, 8 x NVIDIA H100 80GB HBM3"
    assert judge(machine, config(8)).verdict == "ok"
    few = judge(machine, config(16))
    assert few.verdict == "fail"
    assert few.measured == "16 cores, 8 x NVIDIA H100 80GB HBM3, and 16 ranks on a machine need a GPU each"
    assert few.fix == "use fewer ranks, more launch.nodes, or set launch.device to cpu"
    assert judge(Devices(16, ()), config(1, "cuda")).verdict == "fail"
    assert judge(machine, config(16, "cpu")).verdict == "ok"


def test_gpus_of_several_kinds_are_worth_a_word() -> None:
    found = judge(Devices(16, (H100, "NVIDIA A100")), config(2))
    assert found.verdict == "warn" and "1 x NVIDIA H100 80GB HBM3, 1 x NVIDIA A100" in found.measured


def test_ranks_on_cpus_may_share_cores() -> None:
    assert judge(Devices(4, ()), config(4)).verdict == "ok"
    assert judge(Devices(2, ()), config(4)).verdict == "warn"


def test_nvidia_smi_is_asked_without_a_context(nvidia_smi_says: Install) -> None:
    nvidia_smi_says(f"""case "$1" in
    --query-gpu=name) echo "{H100}"; echo "{H100}" ;;
    --query-gpu=driver_version) echo 550.54.15; echo 550.54.15 ;;
esac""")
    assert devices.measure().gpus == (H100, H100)
    assert driver.measure().driver == "550.54.15"


def test_a_driver_that_does_not_work_is_refused(nvidia_smi_says: Install) -> None:
    nvidia_smi_says("echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    with pytest.raises(UserError, match=r"nvidia-smi fails \(Failed to initialize NVML: .* mismatch\); install"):
        devices.measure()


def test_a_driver_that_does_not_answer_is_refused(nvidia_smi_says: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi_says("exec sleep 60")
    monkeypatch.setattr(nvidia_smi, "_ANSWER_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"nvidia-smi has not answered in 0\.1 s; look for Xid"):
        devices.measure()


def test_without_a_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = devices.measure()
    assert found.gpus == () and found.cores >= 1
