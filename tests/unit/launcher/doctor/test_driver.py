"""Which driver, CUDA, torch and NCCL go together."""

from dataclasses import replace

import pytest
import torch

from launcher.doctor.checks.driver import Driver, cuda_of_torch, judge
from trainer.config_file import from_tree

GOOD = Driver(driver="550.54.15", cuda="12.4", torch="2.13.0+cu124", torch_cuda="12.4", nccl="2.27.3", nccl_cuda="12")


def test_what_goes_together_is_ok() -> None:
    found = judge(GOOD, None)
    assert found.verdict == "ok"
    assert found.measured == "driver 550.54.15 (CUDA 12.4), torch 2.13.0+cu124 (CUDA 12.4), NCCL 2.27.3"
    newer = replace(GOOD, driver="580.65", cuda="13.0")
    assert judge(newer, None).verdict == "ok"  # drivers run what was built for older CUDAs


def test_there_is_nothing_to_see_without_a_driver_or_for_ranks_on_cpus() -> None:
    cpu = Driver(driver=None, cuda=None, torch="2.13.0+cpu", torch_cuda=None, nccl=None, nccl_cuda=None)
    assert (judge(cpu, None).verdict, judge(cpu, None).measured) == ("skipped", "no NVIDIA driver")
    assert judge(GOOD, from_tree({"launch": {"device": "cpu"}})).verdict == "skipped"


@pytest.mark.parametrize(
    ("change", "measured", "fix"),
    [
        ({"torch_cuda": None}, "is built without CUDA", "install a CUDA build of torch"),
        (
            {"torch_cuda": "13.0"},
            "driver 550.54.15 (CUDA 12.4) is too old for torch 2.13.0+cu124 (CUDA 13.0)",
            "install driver 580 or newer, or a build of torch for CUDA 12.4",
        ),
        ({"nccl_cuda": "13"}, "NCCL 2.27.3 is for CUDA 13", "pip install nvidia-nccl-cu12"),
    ],
)
def test_what_cannot_work_fails(change: dict[str, str], measured: str, fix: str) -> None:
    found = judge(replace(GOOD, **change), None)
    assert found.verdict == "fail"
    assert measured in found.measured and found.fix.startswith(fix)


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({"torch_cuda": "12.8"}, "may not load on the older driver"),
        ({"cuda": None}, "does not say which CUDA it knows"),
        ({"nccl": None, "nccl_cuda": None}, "no package of NCCL found"),
    ],
)
def test_what_may_work_is_worth_a_word(change: dict[str, str], measured: str) -> None:
    found = judge(replace(GOOD, **change), None)
    assert found.verdict == "warn" and measured in found.measured and found.fix


def test_the_cuda_of_torch_is_read_from_its_file() -> None:
    assert cuda_of_torch() == torch.version.cuda
