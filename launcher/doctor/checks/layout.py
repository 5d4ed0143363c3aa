"""Whether the machines there are can hold the run: their number, labels, GPUs and memory, by the rules of placement."""

from collections.abc import Sequence

from rich.filesize import decimal

from launcher.doctor.finding import Finding, ok, skipped
from launcher.fitting import check_memory, least_bytes
from launcher.placement import Machine, place
from trainer.config import RunConfig

NAME = "layout"


def judge(config: RunConfig | None, machines: Sequence[Machine]) -> Finding:
    """Raises:
    UserError: they cannot.
    """
    if config is None:
        return skipped(NAME, "no config is given")
    check_memory(config, machines)
    where = place(config, machines)
    on = f"{where.gpus_per_node} GPUs" if where.gpus_per_node else "CPUs"
    least = decimal(int(least_bytes(config, on_gpus=where.gpus_per_node > 0)))
    return ok(
        NAME,
        f"{config.parallel.describe()}: {where.ranks_per_node} ranks on {on} of each of {where.nodes} machine(s), "
        f"{least} of memory at least",
    )
