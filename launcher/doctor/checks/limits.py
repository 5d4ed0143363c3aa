"""What the system lets a user have at once: open files of a process, and processes."""

import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.finding import Finding, fail, ok, warn
from trainer.config import RunConfig

FILES, PROCESSES = "open files", "processes"

_LEAST_FILES = 1024  # the usual default, on which small runs work
_FILES_PER_RANK = 8  # gloo connects every two ranks of a group, and a layout has about so many groups; with 256 besides
_ENOUGH_FILES = 65_536  # what Ray's guide to large clusters asks for
_LEAST_PROCESSES = 1024  # threads count: of Ray's processes, some hundreds each
_PROCESSES_PER_RANK = 64
_ENOUGH_PROCESSES = 16_384
_PIDS = Path("/sys/fs/cgroup/pids.max")


@dataclass(frozen=True)
class Limits:
    """None: there is none."""

    files: int | None
    """Soft limit of a process."""
    most_files: int | None
    """To which a process may raise it."""
    processes: int | None
    """Of the user, or of the container where that is less; threads count."""


def measure() -> Limits:
    files, most_files = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    both = [_limit(resource.getrlimit(resource.RLIMIT_NPROC)[0]), _of_container()]
    return Limits(files, most_files, min((each for each in both if each is not None), default=None))


def judge_files(found: Limits, config: RunConfig | None) -> Finding:
    ranks = config.parallel.num_ranks if config else 1
    least = max(_LEAST_FILES, 256 + _FILES_PER_RANK * ranks)
    if found.files is None:
        return ok(FILES, "no limit")
    measured = f"a process may have {found.files:,}"
    can_raise = found.most_files is None or found.most_files >= _ENOUGH_FILES
    fix = f"ulimit -n {_ENOUGH_FILES}" if can_raise else "raise nofile in /etc/security/limits.conf"
    fix += " before `ray start` or this command (docker run --ulimit nofile=65536)"
    if found.files < least:
        return fail(FILES, f"{measured}, and {ranks} rank(s) want {least:,}", fix)
    return (
        warn(FILES, f"{measured}; large runs want 65,536", fix) if found.files < _ENOUGH_FILES else ok(FILES, measured)
    )


def judge_processes(found: Limits, config: RunConfig | None) -> Finding:
    ranks = config.ranks_per_node if config else 1
    least = _LEAST_PROCESSES + _PROCESSES_PER_RANK * ranks
    if found.processes is None:
        return ok(PROCESSES, "no limit")
    measured = f"there may be {found.processes:,}, threads included"
    fix = "raise `ulimit -u`, or the container's limit (docker run --pids-limit, the kubelet's podPidsLimit)"
    if found.processes < least:
        return fail(PROCESSES, f"{measured}, and {ranks} rank(s) with Ray want {least:,}", fix)
    enough = found.processes >= _ENOUGH_PROCESSES
    return ok(PROCESSES, measured) if enough else warn(PROCESSES, f"{measured}; 16,384 leave room", fix)


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _of_container() -> int | None:
    with suppress(OSError, ValueError):  # not in a container, or it says `max`
        return int(_PIDS.read_text())
    return None
