"""One training run over several processes: which of them this is, and sums over all of them.

Each process holds the whole model and an equal, consecutive part of every batch. `Share` is handed to what must look
beyond its part: losses that are means over all pairs or pixels of the batch, the crops' random numbers, validation.
`ALONE` stands for a run in one process, where all of it is free. How processes are started is in `launch`.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn

from toco_core.errors import ToCoError
from toco_core.machine.device import in_float64


class Share(NamedTuple):
    """This process among the `n` that train together; rank 0 writes the run's folder."""

    rank: int = 0
    n: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes, without gradient; all must call it."""
        if self.n == 1:
            return value
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, without gradient; all must call it."""
        return self.total(value) / self.n if self.n > 1 else value

    def numbers(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the processes of scalars, by name, as plain numbers; all must call it."""
        means = self.mean(in_float64(torch.stack([value.detach() for value in values.values()])))
        return dict(zip(values, means.tolist(), strict=True))

    def gathered(self, value: Any) -> list:
        """What each process gives, by rank; all must call it."""
        values = [value] * self.n
        if self.n > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first process gives; all must call it."""
        box = [value]
        if self.n > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def part(self, length: int, what: str = "batch_size") -> slice:
        """This process's consecutive part of `length` things. Raises ToCoError where they cannot be shared equally."""
        if length % self.n:
            raise ToCoError(f"{what} = {length} cannot be shared equally by {self.n} processes")
        size = length // self.n
        return slice(self.rank * size, (self.rank + 1) * size)

    def chunks(self, length: int, size: int) -> list[int]:
        """This process's part of `length` things in chunks of `size`, which are dealt out in turn."""
        return [i for i in range(length) if i // size % self.n == self.rank]


ALONE = Share()
LOST = "gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out waiting|socket"  # how gloo and nccl tell it


def current() -> Share:
    """The share of this process: `ALONE` unless a process group was joined."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return ALONE


@contextlib.contextmanager
def joined(device: str = "auto", **options) -> Iterator[Share]:
    """Join the processes that `torchrun` (or whoever set RANK and WORLD_SIZE) has started; alone otherwise.

    nccl where training is on CUDA, and then each process takes the GPU of its local rank; gloo elsewhere. `options` go
    to `torch.distributed.init_process_group`.
    """
    if not options and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise ToCoError(f"process {local + 1} of this machine has no GPU: it has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    elif device.startswith("cuda"):
        raise ToCoError(f"device = {device!r} in several processes: auto, cuda (each takes one GPU) or cpu is allowed")
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo", **options)
    try:
        yield current()
    except BaseException:
        if not on_cuda:  # nccl is left together: a process that failed would wait for those that wait for it
            torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def shared_step(function: Callable, model: nn.Module, share: Share) -> Callable:
    """`function` of a step of this model, whose result's `total` gives every process the gradient of the mean of all
    totals.

    The model's gradients are averaged by DistributedDataParallel while `total.backward()` runs.
    """
    if share.n == 1:
        return function
    return nn.parallel.DistributedDataParallel(
        _Step(function, model), broadcast_buffers=False, find_unused_parameters=True
    )  # some stages leave heads unused


def unshared_gradients(compute: Callable) -> contextlib.AbstractContextManager:
    """A context in which what `shared_step` returned leaves gradients unaveraged: the next one outside of it averages
    their sum."""
    return compute.no_sync() if isinstance(compute, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


def lost_process(error: BaseException) -> str:
    """What the network says about a process that is gone, in one line; empty for other errors and in a run alone."""
    if current().n == 1 or not isinstance(error, RuntimeError):
        return ""
    text = " ".join(str(error).split())
    return text[:200] if isinstance(error, torch.distributed.DistError) or re.search(LOST, text, re.I) else ""


class _Step(nn.Module):
    """A function of a step as a module's forward pass: DistributedDataParallel watches nothing else."""

    def __init__(self, function: Callable, model: nn.Module):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, step):
        result = self.function(step)
        # only through `total` come gradients: a term outside it would be waited for
        return result._replace(terms={name: value.detach() for name, value in result.terms.items()})
