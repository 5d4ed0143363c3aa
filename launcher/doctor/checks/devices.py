"""GPUs and cores, against the ranks that the config puts on a machine."""

import os
from collections import Counter
from dataclasses import dataclass

from launcher.doctor.checks import nvidia_smi
from launcher.doctor.finding import Finding, fail, ok, warn
from trainer.config import RunConfig

NAME = "devices"


@dataclass(frozen=True)
class Devices:
    cores: int
    """That this process may use."""
    gpus: tuple[str, ...]
    """The name of each."""


def measure() -> Devices:
    """Raises:
    UserError: there is a driver, and it does not work.
    """
    return Devices(len(os.sched_getaffinity(0)), tuple(name for (name,) in nvidia_smi.query("name")))


def uses_gpus(config: RunConfig | None, num_gpus: int) -> bool:
    """Whether ranks would compute on GPUs."""
    device = config.launch.device if config else "auto"
    return device == "cuda" or (device == "auto" and num_gpus > 0)


def judge(found: Devices, config: RunConfig | None) -> Finding:
    """A rank on GPUs needs one for itself; ranks on CPUs may share cores."""
    kinds = Counter(found.gpus)
    gpus = ", ".join(f"{number} x {name}" for name, number in kinds.items()) or "no GPU"
    measured = f"{found.cores} cores, {gpus}"
    ranks = config.ranks_per_node if config else 0
    if uses_gpus(config, len(found.gpus)):
        if len(found.gpus) < ranks or not found.gpus:
            return fail(
                NAME,
                f"{measured}, and {ranks} ranks on a machine need a GPU each",
                "use fewer ranks, more launch.nodes, or set launch.device to cpu",
            )
        if len(kinds) > 1:
            return warn(
                NAME, f"{measured}: every step waits for the slowest", "keep to GPUs of one kind (launch.labels)"
            )
        return ok(NAME, measured + (f" for {ranks} ranks" if ranks else ""))
    if ranks > found.cores:
        return warn(NAME, f"{measured}, shared by {ranks} ranks, which wait for each other", "use fewer ranks")
    return ok(NAME, measured + (f" for {ranks} ranks on the CPU" if ranks else ""))
