"""The precision and the attention kernels that a config computes with, resolved for a device."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch

from toco_core.config import TrainConfig


@runtime_checkable
class HasAttention(Protocol):
    """A model whose attention can be computed by matrix products."""

    def plain_attention(self, *, fused_without_gradient: bool = False) -> AbstractContextManager: ...

    def parameters(self) -> Iterator: ...


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 where the processor has instructions for it, else fp32. No timing: it is the same every time."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = _cpu_has("avx512_bf16") or has_matrix_engines()
    return "bf16" if device.type == "cpu" and native else "fp32"


def has_matrix_engines() -> bool:
    """Whether the processor multiplies bf16 matrices in units of its own (AMX), seven times as fast as float32."""
    return _cpu_has("amx_tile")


def _cpu_has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


def autocast_of(config: TrainConfig, device: torch.device) -> Callable:
    """A function that returns the precision context of a config."""
    bf16 = resolve_precision(config.precision, device) == "bf16"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def attention_of(model: HasAttention, config: TrainConfig, device: torch.device) -> Iterator[None]:
    """The kernels that are the fastest for a config's precision, for everything that is computed in this context.

    In bf16 on a CPU attention by matrix products trains about twice as fast as the fused kernel; with matrix engines
    (AMX) that is so only where a gradient follows, and passes without one take the fused kernel. In `medium` precision
    matrix products of float32 are computed in bf16 by torch's setting, which is restored afterwards.
    """
    precision, products = resolve_precision(config.precision, device), torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        if device.type == "cpu" and precision == "bf16":
            stack.enter_context(model.plain_attention(fused_without_gradient=has_matrix_engines()))
        if precision == "medium":
            stack.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("medium")
        yield


def passes_of(model: HasAttention, config: TrainConfig) -> Callable:
    """A function that returns the context of a pass as a config wants it: kernels and precision."""
    device = next(model.parameters()).device
    autocast = autocast_of(config, device)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with attention_of(model, config, device), autocast():
            yield

    return context
