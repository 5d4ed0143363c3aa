"""What no data sheet says: how much of a device and of its links training reaches. One set for every cluster."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Fitted by `benchmarks/planner_constants.py` on the rows of `published.yaml` that are marked so, and rounded."""

    matrix_share: float = 0.83
    """Of the best matrix product's rate: what products of training reach when they are large."""
    half_size: float = 75.0
    """Length of a side of a matrix product at which it would run at half its rate (elements)."""
    memory_share: float = 0.67
    """Of the memory's bandwidth: what kernels that only move numbers reach."""
    attention_share: float = 0.30
    """Of the best matrix product's rate: what flash attention reaches, forward and backward on the whole."""
    link_share: float = 0.88
    """Of a link's bandwidth: what collectives reach within a machine."""
    network_share: float = 0.95
    """Of a network's bandwidth: what collectives reach between machines."""
    overlap_share: float = 0.82
    """Of the communication that may run beside computation: what it costs no time for."""
    kernel_seconds: float = 4.0e-6
    """Least time of a kernel: its launch, beginning and end; not fitted."""


CONSTANTS = Constants()
