"""How long one thing takes on a device: a matrix product by its shape, a kernel that moves bytes, a collective."""

import math
from dataclasses import dataclass
from math import ceil

from launcher.planning.cluster import Cluster
from launcher.planning.constants import Constants


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: how many, and how many of them share a machine."""

    size: int
    size_in_node: int

    @classmethod
    def of(cls, size: int, stride: int, cluster: Cluster) -> "Group":
        """Of `size` ranks, `stride` apart in the order of ranks, which fill machines one after the other."""
        return cls(size, max(1, min(size, cluster.devices_per_node // stride)))

    @property
    def num_nodes(self) -> int:
        return ceil(self.size / self.size_in_node)


@dataclass(frozen=True)
class Rates:
    """Of one device of a cluster, at the arithmetic of a run."""

    cluster: Cluster
    constants: Constants
    element_bytes: int
    """Of weights and activations: 2 in bf16, 4 in fp32."""

    @property
    def best_flops(self) -> float:
        """Of the best matrix product (1/s)."""
        peak = self.cluster.bf16_flops if self.element_bytes == 2 else self.cluster.fp32_flops
        return peak * self.cluster.achievable_share

    def product_seconds(self, m: float, n: float, k: float, result_bytes: float | None = None) -> float:
        """[m, k] times [k, n]: by its operations, slower the shorter its sides are, or by the bytes it moves.

        A short side leaves tiles and pipelines of the kernel unfilled: each costs a factor 1 + half_size / side.

        Args:
            result_bytes: moved for an element of the result; those of one element by default.
        """
        half, element = self.constants.half_size, self.element_bytes
        slowdown = (1 + half / m) * (1 + half / n) * (1 + half / k)
        by_operations = 2 * m * n * k * slowdown / (self.best_flops * self.constants.matrix_share)
        moved = element * (m * k + k * n) + (element if result_bytes is None else result_bytes) * m * n
        return max(by_operations, moved / self._memory_rate) + self.constants.kernel_seconds

    def attention_seconds(self, flops: float, share: float | None = None) -> float:
        """A flash kernel, which reaches `share` of the best matrix product's rate; a CPU's computes in fp32."""
        best = self.best_flops
        if self.cluster.kind == "cpu":
            best = self.cluster.fp32_flops * self.cluster.achievable_share
        return flops / (best * (share or self.constants.attention_share)) + self.constants.kernel_seconds

    def moving_seconds(self, num_bytes: float, num_kernels: float = 1) -> float:
        """Kernels whose time goes to reading and writing memory."""
        return num_bytes / self._memory_rate + num_kernels * self.constants.kernel_seconds

    def offloaded_seconds(self, num_bytes: float, sent_bytes: float) -> float:
        """The machine's processors move `num_bytes`, and `sent_bytes` go between it and the device."""
        cluster, share = self.cluster, self.constants.memory_share
        return (
            num_bytes / cluster.host_memory_bytes_per_second + sent_bytes / cluster.host_link_bytes_per_second
        ) / share

    def gather_seconds(self, num_bytes: float, group: Group) -> float:
        """An all-gather to `num_bytes` on each rank, or a reduce-scatter from them, around a ring.

        A ring enters every machine once for each rank that it has there, over as many adapters.
        """
        if group.size == 1:
            return 0.0
        moved = num_bytes * (group.size - 1) / group.size
        latency = (group.size_in_node - 1) * self.cluster.link_latency_seconds
        latency += math.log2(group.num_nodes) * self.cluster.network_latency_seconds
        return moved / self._group_rate(group) + latency + self.constants.kernel_seconds

    def reduce_seconds(self, num_bytes: float, group: Group) -> float:
        """An all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gather_seconds(num_bytes, group)

    def exchange_seconds(self, num_bytes: float, group: Group) -> float:
        """An all-to-all of `num_bytes` on each rank, most of which cross the network where the group does."""
        if group.size == 1:
            return 0.0
        moved = num_bytes * (group.size - 1) / group.size
        rate = self._link_rate if group.num_nodes == 1 else self._network_rate
        return moved / rate + self._latency(group.num_nodes > 1) + self.constants.kernel_seconds

    def send_seconds(self, num_bytes: float, crosses_nodes: bool) -> float:
        """From one rank to another."""
        rate = self._network_rate if crosses_nodes else self._link_rate
        return num_bytes / rate + self._latency(crosses_nodes) + self.constants.kernel_seconds

    def _group_rate(self, group: Group) -> float:
        if group.num_nodes == 1:
            return self._link_rate
        return min(self._link_rate, self._network_rate * group.size_in_node)

    def _latency(self, crosses_nodes: bool) -> float:
        return self.cluster.network_latency_seconds if crosses_nodes else self.cluster.link_latency_seconds

    @property
    def _memory_rate(self) -> float:
        return self.cluster.memory_bytes_per_second * self.constants.memory_share

    @property
    def _link_rate(self) -> float:
        return self.cluster.link_bytes_per_second * self.constants.link_share

    @property
    def _network_rate(self) -> float:
        return self.cluster.network_bytes_per_second * self.constants.network_share
