"""What devices can do, by the vendors' data sheets."""

PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312.0e12}
"""Part of a device's name -> dense bf16 floating-point operations a second (SXM modules, without sparsity)."""


def peak_flops(device_name: str) -> float | None:
    """Of a device that is known by its name."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)
