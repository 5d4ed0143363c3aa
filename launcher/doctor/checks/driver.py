"""The NVIDIA driver, the CUDA that torch was built for, and NCCL: whether they go together.

A build for CUDA x.y runs on every driver of CUDA x or newer, but on one older than x.y without what is compiled when it
runs (PTX): https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, whose table 1 has the
least driver of each x. Nothing is imported to find out: torch says its CUDA in a file.
"""

import ctypes
import importlib.util
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launcher.doctor.checks import nvidia_smi
from launcher.doctor.finding import Finding, fail, ok, skipped, warn
from trainer.config import RunConfig

NAME = "driver"
_LEAST_DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Driver:
    driver: str | None
    """None: there is none."""
    cuda: str | None
    """The newest that the driver knows, 12.4."""
    torch: str | None
    torch_cuda: str | None
    """None: a build for CPUs."""
    nccl: str | None
    nccl_cuda: str | None
    """The major version that this NCCL is built for."""


def measure() -> Driver:
    """Raises:
    UserError: there is a driver, and it does not work.
    """
    rows = nvidia_smi.query("driver_version")
    torch_cuda = cuda_of_torch()
    nccl, nccl_cuda = _nccl(torch_cuda)
    return Driver(rows[0][0] if rows else None, _cuda_of_driver(), _version("torch"), torch_cuda, nccl, nccl_cuda)


def judge(found: Driver, config: RunConfig | None) -> Finding:
    if found.driver is None:
        return skipped(NAME, "no NVIDIA driver")
    if config and config.launch.device == "cpu":
        return skipped(NAME, f"driver {found.driver}, and launch.device is cpu")
    on, build = f"driver {found.driver} (CUDA {found.cuda})", f"torch {found.torch} (CUDA {found.torch_cuda})"
    if found.torch_cuda is None:
        return fail(NAME, f"{on}, and torch {found.torch} is built without CUDA", "install a CUDA build of torch")
    if found.cuda is None:
        return warn(
            NAME, f"driver {found.driver} does not say which CUDA it knows", "see that libcuda.so.1 can be loaded"
        )
    wanted = _numbers(found.torch_cuda)
    if _numbers(found.cuda)[0] < wanted[0]:
        least = _LEAST_DRIVERS.get(wanted[0])
        newer = f"driver {least} or newer" if least else "a newer driver"
        return fail(NAME, f"{on} is too old for {build}", f"install {newer}, or a build of torch for CUDA {found.cuda}")
    if found.nccl is None:
        return warn(NAME, f"{on}, {build}, no package of NCCL found", f"pip install nvidia-nccl-cu{wanted[0]}")
    if found.nccl_cuda != str(wanted[0]):
        return fail(
            NAME,
            f"NCCL {found.nccl} is for CUDA {found.nccl_cuda}, and {build} loads one for CUDA {wanted[0]}",
            f"pip install nvidia-nccl-cu{wanted[0]} in the version that torch asks for",
        )
    measured = f"{on}, {build}, NCCL {found.nccl}"
    if _numbers(found.cuda) < wanted:
        return warn(
            NAME,
            f"{measured}: kernels that are compiled when they run may not load on the older driver",
            f"install a driver of CUDA {found.torch_cuda}",
        )
    return ok(NAME, measured)


def cuda_of_torch() -> str | None:
    spec = importlib.util.find_spec("torch")  # does not import it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        with suppress(OSError):
            match = re.search(r"^cuda\b[^=]*= '([\d.]+)'", Path(folder, "version.py").read_text(), flags=re.MULTILINE)
            return match[1] if match else None
    return None


def _cuda_of_driver() -> str | None:
    """Asked of the driver's library, which answers this before it is initialised."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"


def _nccl(torch_cuda: str | None) -> tuple[str | None, str | None]:
    """Version and CUDA of the package: that of torch's CUDA, if there are several."""
    majors = [str(major) for major in _LEAST_DRIVERS]
    wanted = str(_numbers(torch_cuda)[0]) if torch_cuda else None
    for major in sorted({*majors, wanted or majors[0]}, key=lambda major: (major != wanted, major)):
        if found := _version(f"nvidia-nccl-cu{major}"):
            return found, major
    return None, None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
