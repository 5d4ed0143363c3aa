"""How a job lies on machines: which ranks on which, with how many threads and GPUs. Arithmetic, no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config import RunConfig, UserError

Resources = Mapping[str, float]
"""What Ray counts on a machine, by name: CPU, GPU, ..."""


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


def place(config: RunConfig, machines: Sequence[Resources]) -> Placement:
    """Lay the run's ranks on a cluster of `machines`.

    Raises:
        UserError: the cluster is too small.
    """
    nodes, ranks = config.launch.nodes, config.ranks_per_node
    gpus = ranks if _wants_gpus(config, machines) else 0
    placement = Placement(nodes, ranks, gpus)
    able = [machine for machine in machines if all(machine.get(name, 0) >= n for name, n in placement.bundle.items())]
    wanted, spares = nodes + config.launch.spares, config.launch.spares
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


def threads_per_rank(config: RunConfig, cores: int) -> int:
    """CPU threads of each rank on a machine of `cores` cores."""
    return config.launch.threads_per_rank or max(1, cores // config.ranks_per_node)


def _wants_gpus(config: RunConfig, machines: Sequence[Resources]) -> bool:
    wanted = config.launch.device
    return wanted == "cuda" or (wanted == "auto" and any(machine.get("GPU", 0) > 0 for machine in machines))


def _listed(machines: Sequence[Resources], name: str) -> str:
    """'8, 8 and 0 GPUs' or '0 GPUs'."""
    counts = [f"{machine.get(name, 0):g}" for machine in machines] or ["0"]
    return f"{' and '.join(filter(None, [', '.join(counts[:-1]), counts[-1]]))} {name}s"
