"""Double precision, which not every device has: where it is missing (Apple's MPS), what comes nearest."""

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # device types


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no other."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def in_float64(values: Tensor) -> Tensor:
    """The same numbers in float64, on their device if it has that and on the CPU otherwise."""
    return (values.cpu() if values.device.type in WITHOUT_FLOAT64 else values).double()
