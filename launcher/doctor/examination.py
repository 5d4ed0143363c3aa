"""All checks, in the order in which a person reads them: this machine, or those of a cluster."""

from collections.abc import Iterator
from dataclasses import asdict, replace

from launcher.doctor import loopback
from launcher.doctor.checks import clock, layout, network, versions
from launcher.doctor.finding import Finding, skipped
from launcher.doctor.guard import Check, outcome
from launcher.doctor.machine import Subject, examine
from trainer.config import RunConfig

_QUICK_SECONDS = 10.0
_IMPORT_SECONDS = 60.0  # of Ray, from a disk that is cold
_LO = "see that the interface lo is up"


def examination(subject: Subject, ray: str | None = None) -> Iterator[Finding]:
    """Of this machine; with the address of a Ray cluster, of that instead. Each finding comes when it is there."""
    if ray is not None:
        from launcher.doctor.cluster import examine_cluster

        yield from examine_cluster(subject, ray)
        return
    yield from examine(subject)
    yield skipped(clock.NAME, "one machine")
    yield outcome(Check(versions.NAME, _QUICK_SECONDS, _versions, "install Broadgauge again"))
    layout_check = Check(layout.NAME, _IMPORT_SECONDS, lambda: _layout(subject.config), "install Ray again")
    yield outcome(layout_check)
    yield outcome(Check(network.NAME, loopback.LONGEST_SECONDS, lambda: _network(subject.config), _LO))


def _versions() -> Finding:
    found = {"this machine": versions.measure()}
    return replace(versions.judge(found), facts=found)


def _layout(config: RunConfig | None) -> Finding:
    if config is None:
        return layout.judge(config, [])
    from launcher.job.ranks import check_embedded, this_machine  # imports Ray

    check_embedded(config)
    return layout.judge(config, [this_machine(config)])


def _network(config: RunConfig | None) -> Finding:
    found = loopback.measure(config)
    return replace(network.judge(found), facts=asdict(found))
