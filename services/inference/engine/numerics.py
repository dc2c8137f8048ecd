"""Sums in float64 wherever the device is."""

from torch import Tensor

_WITHOUT_FLOAT64 = frozenset({"mps"})
"""Devices that have no float64."""


def precise(x: Tensor) -> Tensor:
    """`x` in float64: where it is, or on the CPU where its device has none."""
    return (x.cpu() if x.device.type in _WITHOUT_FLOAT64 else x).double()
