"""How a job lies on machines: which ranks on which, with how many threads and GPUs. Arithmetic, no Ray."""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.config import RunConfig, UserError

ACCELERATOR = "ray.io/accelerator-type"
"""The label by which Ray says what GPUs a machine has."""


@dataclass(frozen=True)
class Machine:
    """One of a cluster."""

    resources: Mapping[str, float]
    """What Ray counts on it, by name: CPU, GPU, memory (bytes), ..."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What Ray knows of it besides: `ray.io/accelerator-type`, `ray.io/availability-zone`, ..."""
    address: str = ""
    id: str = ""
    """Ray's name of it (hex)."""


@dataclass(frozen=True)
class Placement:
    """Ranks are numbered machine by machine, `ranks_per_node` on each."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def bundle(self) -> dict[str, float]:
        """What the job reserves on each machine.

        One logical CPU whatever the number of ranks: ranks share cores by their thread counts, and a laptop may hold
        more ranks than cores.
        """
        gpus = {"GPU": float(self.gpus_per_node)} if self.gpus_per_node else {}
        return {"CPU": 1.0, **gpus}

    def ranks_of(self, node: int) -> range:
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)


def place(config: RunConfig, machines: Sequence[Machine]) -> Placement:
    """Lay the run's ranks on a cluster of `machines`.

    Raises:
        UserError: the cluster is too small, or its machines have other labels.
    """
    machines = _labelled(config, machines)
    nodes, ranks, spares = config.launch.nodes, config.ranks_per_node, config.launch.spares
    gpus = ranks if _wants_gpus(config, machines) else 0
    placement = Placement(nodes, ranks, gpus)
    able = usable(config, placement, machines)
    wanted = nodes + spares
    if len(able) >= wanted:
        return placement
    and_spares = f" and launch.spares {spares}" if spares else ""
    if gpus:
        raise UserError(
            f"{ranks} ranks per machine need {ranks} GPUs on {wanted} machine(s), and the cluster has "
            f"{_listed(machines, 'GPU')}; use fewer ranks, or set launch.device to cpu"
        )
    raise UserError(
        f"launch.nodes {nodes}{and_spares} needs {wanted} machines with a CPU to spare, and the cluster has "
        f"{len(able)}; set launch.nodes to {max(1, len(able) - spares)}, or add machines"
    )


def usable(config: RunConfig, where: Placement, machines: Sequence[Machine]) -> list[Machine]:
    """Those with the labels and the devices that the run asks for.

    Raises:
        UserError: too few have the labels.
    """
    return [machine for machine in _labelled(config, machines) if _has(machine, where.bundle)]


def check_beside(config: RunConfig, other: RunConfig, machines: Sequence[Machine]) -> None:
    """Refuse a second job that has no room beside the run's on the same machines, which may hold a part of both.

    Raises:
        UserError: the cluster is too small for the two.
    """
    able = [machine for machine in machines if config.launch.labels.items() <= machine.labels.items()]
    first, second = place(config, able), place(other, able)
    number, one, two = first.nodes + config.launch.spares, first.bundle, second.bundle
    both = {name: one.get(name, 0.0) + two.get(name, 0.0) for name in one | two}
    for_second = [machine for machine in able if _has(machine, two)]
    uncontended = [each for each in able if _has(each, one) and (_has(each, both) or not _has(each, two))]
    if len(for_second) - max(0, number - len(uncontended)) < second.nodes:
        gpus = f" with {second.gpus_per_node} GPUs" if second.gpus_per_node else ""
        raise UserError(
            f"evaluation.where is service, whose ranks need {second.nodes} machine(s){gpus} beside the run's {number}, "
            f"and the cluster has {len(machines)}; add machines, or set evaluation.where to ranks"
        )


def in_order(config: RunConfig, machines: Sequence[Machine]) -> list[int]:
    """Which of the machines is the run's first, second, ...: an index for each; spares come last.

    Machines that the labels in `launch.topology` say to be near each other (the widest first), and then those with
    near addresses, hold one replica of the model, stage after stage of its pipeline; where a stage has several
    machines, the n-th of each stage are neighbours. Ranks are numbered stage by stage, and so must machines be.
    """
    near = sorted(range(len(machines)), key=lambda index: _whereabouts(config, machines[index]))
    nodes, stages = config.launch.nodes, config.parallel.pipeline
    if nodes % stages:  # stages end inside machines
        return near
    each = nodes // stages
    return [near[node % each * stages + node // each] for node in range(nodes)] + near[nodes:]


def threads_per_rank(config: RunConfig, cores: int) -> int:
    """CPU threads of each rank on a machine of `cores` cores."""
    return config.launch.threads_per_rank or max(1, cores // config.ranks_per_node)


def _labelled(config: RunConfig, machines: Sequence[Machine]) -> Sequence[Machine]:
    """Those with the labels that the run asks for.

    Raises:
        UserError: too few.
    """
    labels, wanted = config.launch.labels, config.launch.nodes + config.launch.spares
    found = [machine for machine in machines if labels.items() <= machine.labels.items()]
    if labels and len(found) < wanted:
        asked = ", ".join(f"{name}={value}" for name, value in labels.items())
        there = sorted(
            {f"{name}={machine.labels[name]}" for machine in machines for name in labels.keys() & machine.labels.keys()}
        )
        raise UserError(
            f"launch.labels {asked} are on {len(found)} of {len(machines)} machines, and {wanted} are needed; the "
            f"cluster has {', '.join(sorted(there)) or 'no such labels'}; change launch.labels, or label machines "
            "(`ray start --labels`)"
        )
    return found


def _whereabouts(config: RunConfig, machine: Machine) -> tuple[object, ...]:
    try:
        address = ipaddress.ip_address(machine.address)
        place: tuple[object, ...] = (address.version, int(address))
    except ValueError:  # a name, or none
        place = (0, machine.address)
    return (*(machine.labels.get(name, "") for name in config.launch.topology), place, machine.id)


def _has(machine: Machine, need: Mapping[str, float]) -> bool:
    return all(machine.resources.get(name, 0.0) >= amount for name, amount in need.items())


def _wants_gpus(config: RunConfig, machines: Sequence[Machine]) -> bool:
    wanted = config.launch.device
    return wanted == "cuda" or (wanted == "auto" and any(machine.resources.get("GPU", 0) > 0 for machine in machines))


def _listed(machines: Sequence[Machine], name: str) -> str:
    """'8, 8 and 0 GPUs' or '0 GPUs'."""
    counts = [f"{machine.resources.get(name, 0):g}" for machine in machines] or ["0"]
    return f"{' and '.join(filter(None, [', '.join(counts[:-1]), counts[-1]]))} {name}s"
