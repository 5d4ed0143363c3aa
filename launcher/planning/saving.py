"""What saving and loading take: from bytes and bandwidths, by how `docs/checkpoints.md` says that a state is saved."""

import math
from dataclasses import dataclass
from functools import cached_property

from launcher.memory import checkpoint_bytes
from launcher.planning.cluster import Cluster
from trainer.checkpoint.interval import FailureHistory, optimal_seconds
from trainer.config import RunConfig

_COPIED_BYTES_PER_SECOND = 6.0e9
"""By one rank into shared memory; benchmarks/NOTES.md, "Checkpoints": 1.1 GB by two ranks in 0.091 s."""
_ROUNDING = 1e-6  # steps, by which a time of whole steps may seem longer
_WAYS_TO_STORAGE = 2  # what is written is read back and compared


@dataclass(frozen=True)
class SaveTimes:
    """Of a run on a cluster, all ranks at once."""

    config: RunConfig
    cluster: Cluster

    @property
    def snapshot_seconds(self) -> float:
        """For which a rank copies its state into shared memory, through the machine's memory where it is on a GPU."""
        return self._rank_bytes / _COPIED_BYTES_PER_SECOND + self._device_seconds

    @property
    def stall_seconds(self) -> float:
        """For which a checkpoint holds training up, if the one before is written."""
        return self.snapshot_seconds if self.config.checkpoint.asynchronous else self._to_storage_seconds

    @property
    def written_seconds(self) -> float:
        """From the stall until the checkpoint is on the storage."""
        return self._to_storage_seconds if self.config.checkpoint.asynchronous else 0.0

    @property
    def load_from_memory_seconds(self) -> float:
        return self._rank_bytes / _COPIED_BYTES_PER_SECOND + self._device_seconds

    @property
    def load_from_neighbour_seconds(self) -> float:
        """What a machine in a lost one's place fetches first."""
        return self._rank_bytes / self.cluster.network_bytes_per_second + self.load_from_memory_seconds

    @property
    def load_from_storage_seconds(self) -> float:
        return self._node_bytes / self.cluster.storage_bytes_per_second + self._device_seconds

    def interval_steps(self, step_seconds: float) -> float:
        """Between checkpoints, by steps or time, whichever comes first."""
        policy = self.config.checkpoint
        steps = float(policy.interval_steps or float("inf"))
        if policy.every_seconds is None:
            return steps
        seconds = policy.every_seconds
        if seconds == "auto":
            seconds = optimal_seconds(FailureHistory(stall_seconds=(self.stall_seconds,)), self._num_ranks)
        return min(steps, max(1.0, math.ceil(seconds / step_seconds - _ROUNDING)))

    def num_snapshots(self, interval_steps: float) -> int:
        """From one checkpoint to the next, which counts as one of them."""
        between = self.config.checkpoint.snapshot_every_steps
        return max(1, round(interval_steps / between)) if between else 1

    def seconds_per_step(self, step_seconds: float) -> float:
        """For which saving holds training up, spread over steps that take `step_seconds` otherwise."""
        steps = self.interval_steps(step_seconds)
        waits = max(0.0, self.written_seconds - steps * step_seconds)
        return ((self.num_snapshots(steps) - 1) * self.snapshot_seconds + self.stall_seconds + waits) / steps

    @property
    def _num_ranks(self) -> int:
        return self.config.parallel.num_ranks

    @cached_property
    def _rank_bytes(self) -> float:
        return checkpoint_bytes(self.config) / self._num_ranks

    @property
    def _node_bytes(self) -> float:
        return self._rank_bytes * min(self._num_ranks, self.cluster.devices_per_node)

    @property
    def _to_storage_seconds(self) -> float:
        return _WAYS_TO_STORAGE * self._node_bytes / self.cluster.storage_bytes_per_second + self._device_seconds

    @property
    def _device_seconds(self) -> float:
        """Between a device and its machine's memory, which an offloaded state does not leave."""
        if self.cluster.kind == "cpu" or self.config.parallel.offload == "optimizer":
            return 0.0
        return self._rank_bytes / self.cluster.host_link_bytes_per_second
