"""Modules of shapes alone, on PyTorch's meta device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from toco_core.machine.torchvision_shim import make_importable


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Within this context a timm encoder and the heads on it are built without memory for their numbers."""
    make_importable()  # before: that of PyTorch 2.6 computes with numbers while it is imported
    with torch.device("meta"), _NumbersOnCPU():
        yield


class _NumbersOnCPU(TorchFunctionMode):
    """Leave `torch.linspace` its numbers: timm before 1.0.21 reads them while it builds."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = {"device": "cpu"} if function is torch.linspace else {}
        return function(*args, **more | (kwargs or {}))
