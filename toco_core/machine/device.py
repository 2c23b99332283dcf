"""What the machine has: devices, double precision, which not every one has (Apple's MPS), and memory that stays.

On Linux, large CPU tensors are mapped anew at each operation unless the process keeps what is freed.
"""

import ctypes
import sys

import torch
from torch import Tensor

from toco_core.errors import ToCoError

WITHOUT_FLOAT64 = ("mps",)  # device types
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 2**31 - 1


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises ToCoError for a device that is not there.

    On CUDA two settings of the process change: a GPU named by its number becomes the current one, which is what pinned
    memory goes by, and a convolution in float32 is computed in float32, not in TF32.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, number = name.partition(":")
    if not there.get(kind) or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise ToCoError(f"device = {name!r} is not on this machine; there is {', '.join(k for k in there if there[k])}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no other."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def in_float64(values: Tensor) -> Tensor:
    """The same numbers in float64, on their device if it has that and on the CPU otherwise."""
    return (values.cpu() if values.device.type in WITHOUT_FLOAT64 else values).double()


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed for the next allocation; True where it agreed.

    The process then holds its peak memory until it ends. Pieces of a training step on a CPU get 1.2 to 5 times faster.
    Nothing happens where the C library is not glibc (macOS, Windows, musl).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_TRIM_THRESHOLD, _LARGE))
    except (OSError, AttributeError):
        return False
