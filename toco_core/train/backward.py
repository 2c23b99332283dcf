"""A batch's backward pass, in one part or in several, and the random numbers of its step."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.machine.distributed import unshared_gradients
from toco_core.model import ToCo
from toco_core.objective import Objective, Step, StepInput
from toco_core.train.rival import oppose


def recorded_blocks(model: ToCo, config: TrainConfig, processes: int = 1) -> contextlib.AbstractContextManager:
    """In which a GPU replays the encoder's blocks in training, where the config wants that. Not where gradients wait
    for other parts of a batch, here or in another process: a replay writes them where it wrote the last ones."""
    schedule = config.schedule
    wanted = schedule.cuda_graphs and schedule.accumulate == processes == 1
    return model.recorded_blocks() if wanted else contextlib.nullcontext()


def backward(
    compute: Callable[[Step], Objective],
    model: ToCo,
    batch: StepInput,
    config: TrainConfig,
    number: int = 0,
    *,
    rival: ToCo | None = None,
    **options,
) -> Objective:
    """A batch's objective and its backward pass, in `config.schedule.accumulate` parts one after the other.

    Memory holds the graph of one part at a time; losses and gradients are those of the whole batch in one piece. Where
    there are several parts, the labels of all come first, as some terms are means over all of them: one more pass of
    the main images through the encoder.

    `compute` as `distributed.shared_step` returns it, `options` as for `Step`. The result has no graph.

    rival: a second network on the same images; `compute` is then to make its gradient, too (see `rival.of_both`).
    """
    n = config.schedule.accumulate
    if model.graphs is not None:
        model.graphs.begin_step()
    parts = [StepInput(*part) for part in zip(*(value.chunk(n) for value in batch), strict=True)]
    steps = [Step(model, part, config, number, parts=n, **options) for part in parts]
    if rival is not None:
        oppose(steps, rival)
    if n > 1:
        _make_labels(steps)
    found = []
    while steps:  # each goes when it is done: what it computed is large
        step = steps.pop(0)
        with unshared_gradients(compute) if steps else contextlib.nullcontext():
            result = compute(step)
            (result.total / n).backward()
        found.append(Objective(result.total.detach(), {name: value.detach() for name, value in result.terms.items()}))
        if step.rival is not None:
            step.rival.rival = None  # steps that hold each other would stay in memory
        del step, result
    if n == 1:
        return found[0]
    terms = {name: torch.stack([one.terms[name] for one in found]).mean(0) for name in found[0].terms}
    return Objective(torch.stack([one.total for one in found]).mean(), terms)


def _make_labels(steps: list[Step]) -> None:
    """The labels of all parts of a batch, and what is counted in them over all parts and processes."""
    first = steps[0]
    wanted = {name: term for name, term in first.terms.items() if first.weights.get(name, 0) > 0 and term.label}
    counted = {name: term for name, term in wanted.items() if term.count}
    graph = first.graph
    networks = [steps] + ([] if first.rival is None else [[step.rival for step in steps]])
    sums: list[dict[str, Tensor]] = [{} for _ in networks]
    for part in zip(*networks, strict=True):  # rivals together: each asks for the other's labels
        for step in part:
            step.graph = False
        for step, found in zip(part, sums, strict=True):
            for term in wanted.values():
                step.made(term.label)
            for name, term in counted.items():
                found[name] = found[name] + term.counted(step) if name in found else term.counted(step)
        for step in part:
            step.forget("tokens", "output", "decoded", "seg_logits", "labelled", "unit")
            step.graph = graph
    for network, found in zip(networks, sums, strict=True):
        totals = {name: first.share.total(value) for name, value in found.items()}
        for step in network:
            step.counts = dict(totals)


def crop_generator(config: TrainConfig, step: int, first: int = 0) -> torch.Generator:
    """Draws where local views of a step are cut, from the batch's image number `first` on: the same places, however
    many processes share the batch. Whatever else is random in the step (dropout, if a backbone has any) is seeded,
    too."""
    seed = config.seed * 1_000_003 + step
    torch.manual_seed(seed + first)
    generator = torch.Generator().manual_seed(seed)
    torch.rand(first, config.crops.n_local, generator=generator, dtype=torch.float64)  # those of the images before
    return generator
