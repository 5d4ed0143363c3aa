"""Shared memory: /dev/shm for NCCL and Ray, and the folder in which the config leaves snapshots.

Containers are the trap: docker gives them 64 MB of /dev/shm unless told otherwise, Kubernetes too.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from launcher import memory
from launcher.doctor.checks.folders import existing
from launcher.doctor.finding import Finding, fail, ok, skipped, warn
from trainer.config import RunConfig

NAME, SNAPSHOTS = "shared memory", "snapshots"
SHARED_MEMORY = Path("/dev/shm")
_ENOUGH_BYTES = 10**9  # NCCL's user guide, "Troubleshooting, Docker": `--shm-size=1g`
_MOUNT = "docker run --shm-size, or on Kubernetes an emptyDir of medium Memory at /dev/shm"


@dataclass(frozen=True)
class Space:
    folder: str
    size_bytes: int
    free_bytes: int


def measure(folder: Path) -> Space:
    """Of the file system on which a folder is or would be."""
    there = existing(folder)
    status = os.statvfs(there)
    return Space(str(folder), status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail)


def judge(found: Space, on_gpus: bool) -> Finding:
    """NCCL ends with a bus error where it is small; on CPUs Ray keeps its objects on the disk then."""
    measured = f"{found.folder} has {decimal(found.size_bytes)}, {decimal(found.free_bytes)} free"
    if found.size_bytes >= _ENOUGH_BYTES:
        return ok(NAME, measured)
    reason, fix = "NCCL and Ray want 1 GB", f"give it 1 GB or more ({_MOUNT})"
    return fail(NAME, f"{measured}; {reason}", fix) if on_gpus else warn(NAME, f"{measured}; {reason}", fix)


def judge_snapshots(found: Space, config: RunConfig | None) -> Finding:
    """Where not all copies have room saves wait for the disk; where not even one has, every save does."""
    if config is None:
        return skipped(SNAPSHOTS, "no config is given")
    if not config.checkpoint.asynchronous:
        return skipped(SNAPSHOTS, "checkpoint.asynchronous is false")
    one, all_of_them = memory.snapshot_bytes(config), memory.room_bytes(config)
    measured = (
        f"{found.folder} has {decimal(found.size_bytes)}, {decimal(found.free_bytes)} free; a snapshot takes "
        f"{decimal(one)} on a machine, and {all_of_them // one} of them are kept"
    )
    folder_fix = f"make room for {decimal(all_of_them)} ({_MOUNT}), or set checkpoint.snapshots_in to a fast disk"
    if found.free_bytes < one:
        return fail(SNAPSHOTS, measured, f"{folder_fix}, or checkpoint.asynchronous to false")
    if found.free_bytes < all_of_them:
        return warn(SNAPSHOTS, f"{measured}: saves will wait for the disk", folder_fix)
    return ok(SNAPSHOTS, measured)
