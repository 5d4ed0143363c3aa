"""Machines that a run is planned on: what their devices do, hold and say to each other, read from small YAML files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer import config_file
from trainer.checkpoint.interval import PUBLISHED_RANK_SECONDS_PER_FAILURE
from trainer.config import RunConfig, UserError
from trainer.section import Section

FOLDER = Path(__file__).with_name("clusters")

Amount = Annotated[float, Field(ge=1.0, le=1e24)]
"""Of bytes or operations, or of them in a second. Bounds are wide enough for any machine, and narrow enough for what is
divided by them to be a number."""
Hours = Annotated[float, Field(ge=0.001, le=1e9)]
"""From seconds to longer than anything lasts."""


class Cluster(Section):
    """As published by the vendor: peaks are dense, bandwidths of links are those of one direction."""

    device: str = Field(min_length=1)
    """Name of one device, such as `H100 80GB SXM`."""
    kind: Literal["cuda", "cpu"] = "cuda"
    """What computes: GPUs, or cores with their share of the machine's memory."""
    bf16_flops: Amount
    """Peak of matrix products in bf16 (1/s)."""
    fp32_flops: Amount
    """Peak of matrix products in fp32 (1/s)."""
    achievable_share: float = Field(ge=0.001, le=1.0)
    """Part of the peak that the best matrix product reaches."""
    memory_bytes: Amount
    """Memory of one device."""
    memory_bytes_per_second: Amount
    """Between a device and its memory."""
    host_link_bytes_per_second: Amount
    """From a device to its machine's memory, in one direction."""
    host_memory_bytes_per_second: Amount
    """Between a machine's processors and its memory, a device's share of it."""
    devices_per_node: int = Field(ge=1, le=100_000)
    """Devices of one machine."""
    link_bytes_per_second: Amount
    """From one device to others of its machine, in one direction."""
    link_latency_seconds: float = Field(ge=0.0, le=60.0)
    """Of one message within a machine."""
    network_bytes_per_second: Amount
    """From a machine to others, a device's share of it, in one direction."""
    network_latency_seconds: float = Field(ge=0.0, le=60.0)
    """Of one message between machines."""
    watts_per_device: float | None = Field(None, gt=0.0, le=1e9)
    """Power of a machine at work, a device's share of it."""
    price_per_device_hour: float | None = Field(None, gt=0.0, le=1e9)
    """What one device costs for an hour, in any currency."""
    storage_bytes_per_second: Amount = 1.0e9
    """From a machine to the storage that machines share, and back, while all of them use it. Default: the 2 TB/s that
    2,048 machines of Llama 3's training could hold (Grattafiori et al. 2024, section 3.3.1)."""
    node_mtbf_hours: Hours | None = None
    """Mean time between failures of one machine, whatever fails there. Default: of GPUs 50,700 hours divided by a
    machine's devices, the rate of Llama 3's training (section 3.3.4); of CPUs none, and nothing is said of failures."""
    node_loss_share: float = Field(0.78, ge=0.0, le=1.0)
    """Part of the failures after which the machine has to be replaced. Default: what Llama 3's authors put down to
    hardware (section 3.3.4)."""
    repair_hours: Hours = 24.0
    """Until a machine that was lost is back, or another in its place. Default: an assumption; from less than an hour to
    more than a day on systems at Los Alamos (Schroeder and Gibson 2006)."""
    restart_seconds: float = Field(60.0, ge=0.0, le=1e6)
    """From a failure until ranks that were begun anew start to load their state. Default: an assumption for GPUs; on
    CPUs it takes seconds (docs/supervision.md)."""

    def num_nodes(self, num_devices: int) -> int:
        """Machines that so many devices fill, the last one perhaps in part."""
        return -(-num_devices // self.devices_per_node)

    @property
    def node_failure_seconds(self) -> float | None:
        """Mean time between failures of one machine, where it is known."""
        if self.node_mtbf_hours is not None:
            return 3600 * self.node_mtbf_hours
        return None if self.kind == "cpu" else PUBLISHED_RANK_SECONDS_PER_FAILURE / self.devices_per_node


def load(wanted: str | Mapping[str, Any]) -> Cluster:
    """The cluster of a YAML file, or one that comes along, by its name; or what a config says itself.

    Raises:
        UserError: there is none, or what is said of it is wrong.
    """
    if not isinstance(wanted, str):
        return _validated(wanted, "launch.cluster")
    path = Path(wanted)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{wanted.lower()}.yaml"
        if wanted.lower() not in names():
            known = config_file.suggest(path.stem.partition(".")[0], names())
            raise UserError(f"no cluster {wanted} comes along{known}; name one that does, or a YAML file")
    return _validated(config_file.read_tree(path, "the cluster"), str(path))


def with_its_facts(config: RunConfig) -> RunConfig:
    """The same config, which says itself what a file says of its cluster: other machines need not have the file.

    Raises:
        UserError: as `load`.
    """
    wanted = config.launch.cluster
    if not isinstance(wanted, str):
        return config
    facts = load(wanted)
    if wanted.lower() in names():
        return config
    said = facts.model_dump(mode="json", exclude_unset=True)
    return config.model_copy(update={"launch": config.launch.model_copy(update={"cluster": said})})


def _validated(tree: Mapping[str, Any], where: str) -> Cluster:
    try:
        return config_file.validated(Cluster, tree)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def named_by(config: RunConfig) -> str | dict[str, Any]:
    """What the config calls its cluster; H100s, or a CPU box where it computes on CPUs, if it says nothing."""
    if config.launch.cluster is not None:
        return config.launch.cluster
    return "cpu" if config.launch.device == "cpu" else "h100"


def names() -> list[str]:
    """Of the clusters that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
