"""CUDA graphs of an encoder's blocks: a GPU replays them instead of waiting for the host.

A step of a ViT-B launches some 5,000 kernels, most of them in 72 calls of a block; for a batch of 4 images a processor
needs longer for that than the GPU for the work. A graph of all blocks is recorded once for each kind of pass (size of
batch and view, with or without gradient) and then launched as one: the same kernels on the same numbers.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

WARM_UPS = 3
"""Calls before a recording, in which libraries choose their kernels."""


class BlockGraphs:
    """Runs of transformer blocks, recorded at their first call and replayed from then on.

    What a replay returns is overwritten by the replay of the same pass in the next step. Within a step each pass has a
    recording of its own (`begin_step` tells where one begins), so that two views of one size do not disturb each other.
    """

    def __init__(self, blocks: Iterable[nn.Module]):
        self.blocks = list(blocks)
        self._recorded: dict[tuple, _Recording] = {}
        self._calls: dict[tuple, int] = {}
        self._pool = new_pool()

    def begin_step(self) -> None:
        self._calls.clear()

    def __call__(self, x: Tensor, first: int, tap: int) -> tuple[Tensor, Tensor]:
        """Blocks `first`, `first` + 1, ... (from 0) on tokens B T D: what comes out of number `tap`, and of the last.

        A gradient may flow back once.
        """
        graph = torch.is_grad_enabled()
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = (tuple(x.shape), x.dtype, first, tap, graph, graph and x.requires_grad, autocast)
        number = self._calls[kind] = self._calls.get(kind, 0) + 1
        if (kind, number) not in self._recorded:
            self._recorded[kind, number] = self._record(x, first, tap, autocast)
        recording = self._recorded[kind, number]
        if recording.backward is None:
            recording.x.copy_(x)
            recording.forward()
            found = tuple(output.detach() for output in recording.outputs)
        else:
            found = _Replayed.apply(recording, x, *recording.weights)
        return found[0], found[-1]

    def _record(self, x: Tensor, first: int, tap: int, autocast: torch.dtype | None) -> "_Recording":
        learns = torch.is_grad_enabled()
        own = x.detach().clone().requires_grad_(learns and x.requires_grad)
        # The weights under other names, in the same memory: a recording must not meet the graph that they are part of.
        named = [_aliases(block, learns=learns) for block in self.blocks[first:]]
        trained = [(b, name) for b, aliases in enumerate(named) for name, p in aliases.items() if p.requires_grad]
        wanted = [own] * own.requires_grad + [named[b][name] for b, name in trained]
        outputs: tuple[Tensor, ...] = ()

        def forward() -> tuple[Tensor, ...]:
            nonlocal outputs
            found, y = [], own
            with torch.autocast(x.device.type, autocast, enabled=autocast is not None, cache_enabled=False):
                for number, aliases in enumerate(named, first):
                    y = functional_call(self.blocks[number], aliases, (y,))
                    if number in (tap, len(self.blocks) - 1):
                        found.append(y)
            outputs = tuple(found)
            return tuple(output.detach() for output in outputs)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad([output for output in outputs if output.requires_grad], wanted, given)

        with side_stream():
            for _ in range(WARM_UPS):
                forward()
                given = tuple(torch.zeros_like(output) for output in outputs if output.requires_grad)
                if given:
                    backward()
            outputs = ()
        # What a forward graph keeps for its backward graph no other graph may overwrite; other passes share memory.
        pool = new_pool() if given else self._pool
        ahead, results = captured(forward, pool)
        back, found = captured(backward, pool) if given else (None, ())
        weights = tuple(self.blocks[first + b].get_parameter(name) for b, name in trained)
        learned = tuple(output.requires_grad for output in outputs)
        return _Recording(ahead, own.detach(), results, learned, weights, back, given, found)


class _Recording(NamedTuple):
    """Two graphs and the memory that they read and write."""

    forward: Callable[[], None]
    x: Tensor
    outputs: tuple[Tensor, ...]
    learned: tuple[bool, ...]
    """Which of them have a gradient."""
    weights: tuple[Tensor, ...]
    backward: Callable[[], None] | None
    """None where no gradient follows."""
    given: tuple[Tensor, ...]
    """The gradients with respect to these outputs."""
    found: tuple[Tensor, ...]
    """Those with respect to `x`, where it has one, and the weights."""


class _Replayed(torch.autograd.Function):
    """A recording as an operation."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        recording.x.copy_(x)
        recording.forward()
        found = tuple(output.detach() for output in recording.outputs)
        ctx.mark_non_differentiable(*(y for y, learned in zip(found, recording.learned, strict=True) if not learned))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        learned = [g for g, learned in zip(gradients, recording.learned, strict=True) if learned]
        for own, given in zip(recording.given, learned, strict=True):
            own.copy_(given)
        recording.backward()
        found = [gradient.detach() for gradient in recording.found]
        without = len(recording.weights) + 1 - len(found)  # tokens before frozen blocks have no gradient
        return (None, *[None] * without, *found)


def _aliases(block: nn.Module, *, learns: bool) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_(learns and p.requires_grad) for name, p in block.named_parameters()}


def captured(work: Callable[[], tuple[Tensor, ...]], pool: Any) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """What does some work again, and the tensors that it then writes into."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # another thread pins the next batch
        results = work()
    return graph.replay, results


def new_pool() -> Any:
    """Memory for graphs."""
    return torch.cuda.graph_pool_handle()


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Within this context work goes to another stream, and what follows waits for it; then its memory is given back."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
