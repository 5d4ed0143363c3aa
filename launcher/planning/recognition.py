"""Which cluster a run is on, as far as that can be told: by its config, its devices' names, or this machine."""

import re
from collections.abc import Iterable

from launcher.planning import cluster as clusters
from launcher.planning.cluster import Cluster
from launcher.planning.this_machine import cpu_cluster
from trainer.config import RunConfig

_NAMES = {"a100-80": r"\bA100\b.*\b80 ?GB?\b", "h100": r"\bH100\b", "h200": r"\bH200\b", "b200": r"\bB200\b"}
"""A cluster that comes along -> its devices, as the driver or Ray's label calls them."""
_OTHERS = re.compile(r"PCIe|NVL|MIG", re.IGNORECASE)
"""In the names of devices that do less than those."""


def cluster_of(config: RunConfig, devices: Iterable[str], *, on_gpus: bool) -> Cluster | None:
    """The cluster whose devices the ranks compute on, if it is known.

    A config that means to run on GPUs may be tried on CPUs first: then it is this machine that counts.

    Args:
        devices: names of the GPUs.

    Raises:
        UserError: `launch.cluster` names none, or one that is wrong.
    """
    said = clusters.load(config.launch.cluster) if config.launch.cluster is not None else None
    if said is not None and said.kind == ("cuda" if on_gpus else "cpu"):
        return said
    if not on_gpus:
        return cpu_cluster(config.ranks_per_node, config.launch.threads_per_rank)
    found = {known_by(device) for device in devices}
    name = found.pop() if len(found) == 1 else None
    return clusters.load(name) if name is not None else None


def known_by(device: str) -> str | None:
    """The cluster that comes along with devices of this name."""
    if _OTHERS.search(device):
        return None
    return next((name for name, pattern in _NAMES.items() if re.search(pattern, device)), None)
