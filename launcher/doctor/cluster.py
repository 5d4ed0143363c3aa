"""The machines of a Ray cluster: each is examined by an actor of its own, and they are measured against each other.

Actors reserve nothing, so that a cluster in use can be examined; only ranks of NCCL need a GPU that is free. All
machines are examined at once: what they write at the same time to a file system that they share, a checkpoint will too.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.doctor.checks import clock, devices, layout, network, shared_folder, versions
from launcher.doctor.checks.network import Backend, Network
from launcher.doctor.finding import Finding, fail, ok, refused, skipped
from launcher.doctor.guard import Check, outcome
from launcher.doctor.machine import Subject, examine, longest_seconds
from launcher.job import cluster
from launcher.placement import Machine
from trainer.config import RunConfig, UserError

NAME = "cluster"

_ARRIVAL_SECONDS = 60.0  # for Ray to start a process on a machine and for that to import this
_ANSWER_SECONDS = 10.0
_NETWORK_SECONDS = 2 * network.TIMEOUT_SECONDS
_UNREACHED = "see that its `ray start` is alive and has this Python and Broadgauge"


class Examiner:
    """On one machine."""

    def __init__(self, cwd: str) -> None:
        """`cwd`: where relative paths in the config start, as they do for agents."""
        with suppress(OSError):  # then those are found to be missing
            os.chdir(cwd)

    def examine(self, subject: Subject) -> list[Finding]:
        return list(examine(subject))

    def num_gpus(self) -> int:
        return len(devices.measure().gpus)

    def now(self) -> float:
        return time.time()

    def versions(self) -> versions.Versions:
        return versions.measure()

    def sees(self, path: Path) -> bool:
        return path.exists()


class NetworkRank:
    """On one machine, in a process of its own: torch is imported, and may hang in what it waits for."""

    def pick_rendezvous(self) -> str:
        host = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            return f"tcp://{f'[{host}]' if ':' in host else host}:{probe.getsockname()[1]}"

    def measure(self, rank: int, num_ranks: int, rendezvous: str, backend: Backend) -> Network:
        return network.measure(rank, num_ranks, rendezvous, backend, is_loopback=False)


def examine_cluster(subject: Subject, address: str) -> Iterator[Finding]:
    """Machine by machine, then what concerns all of them; one `fail` where no cluster is found."""
    config = subject.config
    try:
        with cluster.connected(address, config.launch.env if config else {}):
            yield from _examine(subject, cluster.machines())
    except UserError as error:
        yield refused(NAME, error)


def usable(config: RunConfig | None, machines: Sequence[Machine]) -> list[Machine]:
    """Those on which agents may be placed: with a CPU to give, and the labels that the config asks for."""
    labels = config.launch.labels if config else {}
    return [each for each in machines if each.resources.get("CPU", 0) >= 1 and labels.items() <= each.labels.items()]


def names(machines: Sequence[Machine]) -> list[str]:
    """Their addresses; where several have one, with the beginning of Ray's name."""
    count = Counter(each.address for each in machines)
    return [each.address if count[each.address] == 1 else f"{each.address}/{each.id[:8]}" for each in machines]


def _examine(subject: Subject, machines: Sequence[Machine]) -> Iterator[Finding]:
    found = usable(subject.config, machines)
    if not found:
        yield fail(
            NAME, f"{len(machines)} machines, none with a CPU and launch.labels", "add machines, or change labels"
        )
        return
    yield ok(NAME, f"{len(found)} machines to run on: {', '.join(names(found))}")
    with _actors(Examiner, found, os.getcwd()) as examiners:
        by_name = dict(zip(names(found), examiners, strict=True))
        alive = {}
        for name, answer in _answers(by_name, lambda each: each.examine.remote(subject), _examine_seconds(subject)):
            if isinstance(answer, Finding):
                yield replace(answer, node=name)
                continue
            alive[name] = by_name[name]
            yield from (replace(each, node=name) for each in answer)
        for name, each in alive.items():
            yield replace(outcome(_clock(each)), node=name)
        yield _shared_folder(subject, alive)
        yield _versions(alive)
        answered = _answers(alive, lambda each: each.num_gpus.remote(), _ANSWER_SECONDS)
        num_gpus = [answer for _, answer in answered if isinstance(answer, int)]
    yield outcome(Check(layout.NAME, _ANSWER_SECONDS, lambda: layout.judge(subject.config, machines), _UNREACHED))
    reached = [each for each, name in zip(found, names(found), strict=True) if name in alive]
    on_gpus = bool(num_gpus) and devices.uses_gpus(subject.config, min(num_gpus))
    yield _network(reached, "nccl" if on_gpus else "gloo")


@contextmanager
def _actors(kind: type, machines: Sequence[Machine], *args: object, num_gpus: int = 0) -> Iterator[list[Any]]:
    """One on each machine; they are killed at the end, whatever they are doing."""
    remote = ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=0)(kind)
    made: list[Any] = []
    try:
        for machine in machines:
            pinned = NodeAffinitySchedulingStrategy(machine.id, soft=False)
            made.append(remote.options(scheduling_strategy=pinned).remote(*args))
        yield made
    finally:
        for actor in made:
            with suppress(RayError):
                ray.kill(actor)


def _answers(
    actors: Mapping[str, Any], ask: Callable[[Any], Any], seconds: float
) -> Iterator[tuple[str, Any | Finding]]:
    """Machine by machine what it answers to a question put to all at once; a finding where it does not."""
    asked, deadline = {name: ask(actor) for name, actor in actors.items()}, time.monotonic() + seconds
    for name, ref in asked.items():
        try:
            yield name, ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            yield name, fail(NAME, f"no answer in {seconds:g} s", _UNREACHED)
        except RayError as error:
            yield name, fail(NAME, f"the actor that examines it died ({_one_line(error)})", _UNREACHED)


def _examine_seconds(subject: Subject) -> float:
    return _ARRIVAL_SECONDS + longest_seconds(subject)


def _clock(examiner: Any) -> Check:
    def find() -> Finding:
        found = clock.measure(lambda: float(ray.get(examiner.now.remote(), timeout=_ANSWER_SECONDS)))
        return replace(clock.judge(found), facts=asdict(found))

    return Check(clock.NAME, clock.NUM_QUESTIONS * _ANSWER_SECONDS, find, _UNREACHED)


def _shared_folder(subject: Subject, examiners: Mapping[str, Any]) -> Finding:
    try:
        with shared_folder.marker(subject.run_dir) as path:
            answers = list(_answers(examiners, lambda each: each.sees.remote(path), _ANSWER_SECONDS))
    except (UserError, OSError) as error:
        return skipped(shared_folder.NAME, f"nothing can be written to {subject.run_dir} here ({_one_line(error)})")
    return shared_folder.judge(path.parent, {name: answer is True for name, answer in answers})


def _versions(examiners: Mapping[str, Any]) -> Finding:
    answers = _answers(examiners, lambda each: each.versions.remote(), _ANSWER_SECONDS)
    theirs = {name: answer for name, answer in answers if not isinstance(answer, Finding)}
    found = {"this command": versions.measure(), **theirs}
    return replace(versions.judge(found), facts=found)


def _network(machines: Sequence[Machine], backend: Backend) -> Finding:
    if len(machines) < 2:
        return skipped(network.NAME, f"{len(machines)} machine to run on, and nothing to reach from it")
    with _actors(NetworkRank, machines, num_gpus=1 if backend == "nccl" else 0) as ranks:
        try:
            rendezvous = ray.get(ranks[0].pick_rendezvous.remote(), timeout=_ARRIVAL_SECONDS)
            asked = [rank.measure.remote(number, len(ranks), rendezvous, backend) for number, rank in enumerate(ranks)]
            found: Network = ray.get(asked, timeout=_ARRIVAL_SECONDS + _NETWORK_SECONDS)[0]
        except GetTimeoutError:
            free = " and GPUs are free" if backend == "nccl" else ""
            return fail(network.NAME, f"ranks on {len(ranks)} machines have not met in time ({backend})", _open(free))
        except RayError as error:
            return fail(network.NAME, f"{len(ranks)} ranks ({backend}): {_one_line(error)}", _open())
    return replace(network.judge(found), facts=asdict(found))


def _open(more: str = "") -> str:
    return f"see that all ports are open between the machines{more}, and which interface launch.env names"


def _one_line(error: BaseException) -> str:
    """Of what an actor raised, its last line; that of Ray itself, its first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if getattr(error, "cause", None) is not None else lines[0]
