"""What no data sheet says: how much of a device and of its links training reaches."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Defaults are for GPUs.

    Fitted by `benchmarks/planner_constants.py` on the rows of `published.yaml` that are marked so, and rounded.
    """

    matrix_share: float = 0.83
    """Of the best matrix product's rate: what products of training reach when they are large."""
    half_size: float = 79.0
    """Length of a side of a matrix product at which it would run at half its rate (elements)."""
    memory_share: float = 0.64
    """Of the memory's bandwidth: what kernels that only move numbers reach."""
    attention_share: float = 0.465
    """Of the best matrix product's rate: what flash attention reaches over many keys, forward and backward together.
    Not fitted: 335 of 720 TFLOP/s on an H100, FlashAttention-2, which is PyTorch's kernel (Shah et al. 2024,
    arXiv:2407.08608, figures 5 and 6: heads of 128)."""
    attention_half_keys: float = 300.0
    """Keys over which it would run at half of that: the same figures from 512 keys to 16,384, within 3 %."""
    link_share: float = 0.87
    """Of a link's bandwidth: what collectives reach within a machine."""
    network_share: float = 0.94
    """Of a network's bandwidth: what collectives reach between machines."""
    overlap_share: float = 0.77
    """Of the communication that may run beside computation: what it costs no time for."""
    kernel_seconds: float = 4.0e-6
    """Least time of a kernel: its launch, beginning and end; not fitted."""


GPU = Constants()
"""One set for all of them."""
CPU = Constants(
    matrix_share=0.9,
    half_size=10.0,
    memory_share=0.6,
    attention_share=0.3,
    attention_half_keys=0.0,
    link_share=1.0,
    network_share=1.0,
    overlap_share=0.0,
    kernel_seconds=40.0e-6,
)
"""Of PyTorch on a core with AVX-512, rounded: shares from single kernels, timed on a busy machine; the time of a
kernel, with Python and autograd around it, from steps of a tiny model. Communication takes the cores that computation
would have: none is hidden."""
CONSTANTS = {"cuda": GPU, "cpu": CPU}
