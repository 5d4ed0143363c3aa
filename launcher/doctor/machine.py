"""What is looked at on every machine, in this order, and how long each look may take."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.doctor.checks import devices, disk, driver, limits, shared_memory, storage
from launcher.doctor.finding import Finding, skipped
from launcher.doctor.guard import Check, outcome
from trainer.config import RunConfig

_QUICK_SECONDS = 10.0
_DRIVER_SECONDS = 40.0
_DISK_SECONDS = 30.0
_STORAGE_SECONDS = 60.0
_STORE_SECONDS = 15.0  # of one operation on an object store, of several
_LOCAL = "see `dmesg` and the documentation of this check, docs/doctor.md"
_MOUNT = "see whether its file system is mounted and answers (`df`, `ls`), or name another folder"
_REACH = "check its URL or path, your credentials and the network"


@dataclass(frozen=True)
class Subject:
    """What is examined: machines, for a run."""

    config: RunConfig | None
    run_dir: Path
    """Absolute."""


def checks(subject: Subject) -> list[Check]:
    config, space = subject.config, shared_memory
    snapshots_in = Path(config.checkpoint.snapshots_in if config else space.SHARED_MEMORY)

    def check(
        name: str,
        seconds: float,
        measure: Callable[[], Any],
        judge: Callable[[Any, RunConfig | None], Finding],
        fix: str,
    ) -> Check:
        return Check(name, seconds, lambda: _judged(measure, judge, config), fix)

    return [
        check(devices.NAME, _DRIVER_SECONDS, devices.measure, devices.judge, _LOCAL),
        check(driver.NAME, _DRIVER_SECONDS, driver.measure, driver.judge, _LOCAL),
        check(space.NAME, _DRIVER_SECONDS, lambda: space.measure(space.SHARED_MEMORY), _judge_shared_memory, _LOCAL),
        check(space.SNAPSHOTS, _QUICK_SECONDS, lambda: space.measure(snapshots_in), space.judge_snapshots, _MOUNT),
        check(limits.FILES, _QUICK_SECONDS, limits.measure, limits.judge_files, _LOCAL),
        check(limits.PROCESSES, _QUICK_SECONDS, limits.measure, limits.judge_processes, _LOCAL),
        check(disk.NAME, _DISK_SECONDS, lambda: disk.measure(subject.run_dir), disk.judge, _MOUNT),
        *_storage(config),
    ]


def examine(subject: Subject) -> Iterator[Finding]:
    """This machine, one check after another, so that none disturbs what another measures."""
    return (outcome(check) for check in checks(subject))


def longest_seconds(subject: Subject) -> float:
    """Within which `examine` has ended, whatever hangs."""
    return sum(check.seconds for check in checks(subject))


def _judged(
    measure: Callable[[], Any], judge: Callable[[Any, RunConfig | None], Finding], config: RunConfig | None
) -> Finding:
    """The finding, with the numbers behind it."""
    found = measure()
    return replace(judge(found, config), facts=asdict(found))


def _judge_shared_memory(found: shared_memory.Space, config: RunConfig | None) -> Finding:
    return shared_memory.judge(found, devices.uses_gpus(config, len(devices.measure().gpus)))


def _storage(config: RunConfig | None) -> list[Check]:
    if config is None:
        return [Check(storage.NAME, _QUICK_SECONDS, lambda: skipped(storage.NAME, "no config is given"), _REACH)]
    return [_reaching(place) for place in storage.places(config)]


def _reaching(place: storage.Place) -> Check:
    return Check(
        storage.NAME, _STORAGE_SECONDS, lambda: storage.examine(place, _STORE_SECONDS), _REACH, about=place.shown
    )
