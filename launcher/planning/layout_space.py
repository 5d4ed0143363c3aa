"""Every layout that a search looks at: what the trainer accepts, within bounds that are stated here."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from launcher.planning.cluster import Cluster
from trainer.config import RunConfig
from trainer.rules import broken
from trainer.support import RULES

MOST_SEQUENCES = 64
"""Of a micro-batch."""


Grid = tuple[int, int, int, int]
"""How ranks are counted: tensor, pipeline, context, data."""


class Layout(NamedTuple):
    """The settings that a search chooses, by their names in `parallel` and `train`."""

    tensor: int
    pipeline: int
    context: int
    data: int
    virtual_pipeline: int
    micro_batch_size: int
    sequence: bool
    zero: int
    offload: str
    recompute: str

    @classmethod
    def of(cls, config: RunConfig) -> "Layout":
        here = vars(config.parallel) | vars(config.train)
        return cls(**{name: here[name] for name in cls._fields})

    @property
    def grid(self) -> Grid:
        return self[:4]

    @property
    def sharding(self) -> tuple[bool, int, str]:
        """What is split or moved on the same grid: sequence parallelism, ZeRO, offload."""
        return self.sequence, self.zero, self.offload

    @property
    def without_zero(self) -> "Layout":
        """The same, with nothing of ZeRO but its first stage."""
        return self._replace(zero=1, offload="none")

    def settings(self) -> dict[str, Any]:
        """By dotted key, as `--set` takes them."""
        in_train = ("micro_batch_size", "recompute")
        return {f"{'train' if key in in_train else 'parallel'}.{key}": value for key, value in self._asdict().items()}

    def applied(self, config: RunConfig) -> RunConfig:
        """The run in this layout, not validated."""
        values = self._asdict()
        train = {key: values.pop(key) for key in ("micro_batch_size", "recompute")}
        update = {
            "parallel": config.parallel.model_copy(update=values),
            "train": config.train.model_copy(update=train),
        }
        return config.model_copy(update=update)


def on_devices(config: RunConfig, cluster: Cluster, num_devices: int) -> RunConfig:
    """The run on so many devices of the cluster; its layout is still to be chosen.

    In the config's machines, if those are for as many devices and have them; otherwise in as many as they fill.
    """
    launch = config.launch.model_copy(update={"device": cluster.kind})
    if num_devices != config.parallel.num_ranks or config.ranks_per_node > cluster.devices_per_node:
        launch = launch.model_copy(update={"nodes": cluster.num_nodes(num_devices), "ranks_per_node": None})
    return config.model_copy(update={"launch": launch})


def layouts(config: RunConfig, cluster: Cluster, num_devices: int) -> Iterator[Layout]:
    """All that fill the devices and that the trainer accepts, within these bounds.

    - Tensor parallel ranks share a machine: their number divides its devices, or all devices where one machine has
      room for them.
    - A micro-batch has at most `MOST_SEQUENCES` sequences.
    - ZeRO 2 and 3 only where there are ranks to split over, and offload only where devices have memory of their own.

    Args:
        config: of `on_devices`.
    """
    for grid in _grids(config, cluster, num_devices):
        has_replicas = grid[2] * grid[3] > 1
        for first in _accepted(config, Layout(*grid, 1, 1, False, 1, "none", "none")):
            yield from _variants(first, has_replicas, cluster)


def _accepted(config: RunConfig, plain: Layout) -> Iterator[Layout]:
    """A layout with every micro-batch, number of chunks and sequence parallelism.

    What the trainer refuses for one of them it refuses with any of the others too.
    """

    def is_accepted(layout: Layout) -> bool:
        return next(iter(broken(layout.applied(config), RULES)), None) is None

    splits = [plain._replace(sequence=each) for each in ((False, True) if plain.tensor > 1 else (False,))]
    splits = [each for each in splits if is_accepted(each)]
    sizes = [each for each in _divisors(config.train.global_batch_size // plain.data) if each <= MOST_SEQUENCES]
    for size in sizes if splits else ():
        sized = plain._replace(micro_batch_size=size)
        if not is_accepted(sized):
            continue
        for chunks in _divisors(config.model.num_layers // plain.pipeline):
            chunked = sized._replace(virtual_pipeline=chunks)
            if chunks == 1 or is_accepted(chunked):
                yield from (chunked._replace(sequence=each.sequence) for each in splits)


def _variants(first: Layout, has_replicas: bool, cluster: Cluster) -> Iterator[Layout]:
    """The same with every ZeRO stage, offload and recomputation, which no rule of the trainer is about."""
    for zero in (1, 2, 3) if has_replicas else (1,):
        for offload in ("none", "optimizer") if cluster.kind == "cuda" else ("none",):
            for recompute in ("none", "selective", "full"):
                yield Layout(*first[:7], zero, offload, recompute)


def _grids(config: RunConfig, cluster: Cluster, num_devices: int) -> Iterator[Grid]:
    """Tensor, pipeline, context, data: by necessary conditions that are quick to check."""
    model, here = config.model, cluster.devices_per_node
    for tensor in _divisors(num_devices):
        if (num_devices if num_devices <= here else here) % tensor or model.num_heads % tensor:
            continue
        for pipeline in _divisors(num_devices // tensor):
            if model.num_layers % pipeline:
                continue
            for context in _divisors(num_devices // tensor // pipeline):
                data = num_devices // (tensor * pipeline * context)
                if model.num_heads % (tensor * context) == 0 and config.train.global_batch_size % data == 0:
                    yield tensor, pipeline, context, data


def _divisors(number: int) -> list[int]:
    """Ascending."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})
