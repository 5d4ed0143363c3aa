"""This machine as a cluster of one."""

import os

from launcher.planning.cluster import Cluster, load

_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_cluster(ranks: int) -> Cluster:
    """With a share of its memory for each of so many ranks."""
    whole = os.sysconf("SC_PHYS_PAGES") * _PAGE
    return load("cpu").model_copy(update={"memory_bytes": whole / ranks, "devices_per_node": ranks})
