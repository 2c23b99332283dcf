"""What a training takes, measured before it starts: the device's memory, and whether that is free; and time.

    print(step_memory(config, data))
    print(estimate_seconds(config, data))

One step is computed with at most two images and everything that is allocated is counted. More images take
proportionally more (roughly: maps are of an image's classes, lattices of its colours); what is per parameter, weights
and AdamW's moments, is added. Not counted: Python, CUDA's own, the decoded images of `cache`, kept tokens of frozen
blocks (`KeptTokens`: at most 2 GiB), and what single operations use inside. On a CPU, where that is 0.2 to 1.4 GB, a
process's peak grew by 6 % less to 8 % more than is said here, below that by up to 35 MB more (`tests/peak_memory.py`);
never compared on a GPU.
"""

import time
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toco_core.config import TrainConfig, override
from toco_core.data import TrainVal
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.machine.device import keep_freed_memory, resolve_device
from toco_core.machine.memory import GIB, free_memory
from toco_core.machine.precision import attention_of, autocast_of, resolve_precision
from toco_core.model import ToCo, build_model
from toco_core.objective import TERMS, StepInput, Term, stage_starts
from toco_core.train.backward import backward, recorded_blocks
from toco_core.train.batches import config_batches, to_device
from toco_core.train.kept_tokens import KeptTokens, kept_blocks
from toco_core.train.rival import build_rival, of_both
from toco_core.train.teacher import build_teacher, teacher_of, teaching
from toco_core.train.warm_start import pooled_tokens

MEASURED = 2  # images at most; with one alone the weights' gradients may be the peak
MARGIN = 1.1  # the estimate may be this much too low


class StepMemory(NamedTuple):
    """Bytes that training takes on one device, at most at any time of a step."""

    device: str
    batch_size: int
    images: int
    """Whose graph is held at a time: a process's part of a part of the batch."""
    equal_parts: tuple[int, ...]
    """Today's `accumulate` and the larger ones that are possible."""
    gradients: int
    """Of all trained parameters."""
    fixed: int
    """Weights and AdamW's two moments; further gradients where parts or processes are summed."""
    step: int
    """What a step allocates above that."""
    free: int | None
    """What is free before; None where the system does not say."""
    precision: str

    @property
    def total(self) -> int:
        return self.fixed + self.step

    @property
    def fits(self) -> bool:
        """False where it is known not to, with a margin for the error of the estimate."""
        return self.free is None or MARGIN * self.total <= self.free

    def parts_that_fit(self) -> int | None:
        """The smallest `accumulate` above today's with which it would fit; None where there is none."""
        today, *more = self.equal_parts
        fixed = self.fixed + (self.gradients if today == 1 else 0)
        return next((n for n in more if MARGIN * (fixed + self.step * today / n) <= (self.free or 0)), None)

    def __str__(self) -> str:
        at_once = f"{self.images} of {self.batch_size} images at once"
        text = f"a step takes about {self.total / GIB:.2f} GiB on {self.device} ({at_once}, {self.precision})"
        if self.free is None:
            return text
        if self.fits:
            return f"{text}; {self.free / GIB:.1f} GiB are free"
        parts = self.parts_that_fit()
        ways = [f"accumulate = {parts} (the same losses)"] if parts else []
        ways += ["a smaller crop_size"] + (["precision = 'bf16'"] if self.precision == "fp32" else [])
        return f"{text} and may not fit: {self.free / GIB:.2f} GiB are free; what helps: {', '.join(ways)}"


def step_memory(
    config: TrainConfig, data: TrainVal, *, processes: int = 1, terms: Mapping[str, Term] = TERMS
) -> StepMemory:
    """What a step of the last stage, in which most terms count, takes on the device of the config.

    `processes`: how many share the batch, each with a device (or a part of this machine's memory) of its own. Raises
    ToCoError where not even the images that are measured fit.
    """
    device, schedule = resolve_device(config.device), config.schedule
    images = schedule.images_at_once(processes)
    measured = min(images, MEASURED)
    torch.manual_seed(config.seed)
    place = device if device.type == "cuda" else torch.device("cpu")  # MPS does not say what its peak was
    free = free_memory(device)
    try:
        model = build_model(config, data.train.n_classes).to(place).train()
        model.freeze_blocks(schedule.frozen_blocks)
        rival = build_rival(model, config)
        networks = [model] if rival is None else [model, rival]
        trained = [p for network in networks for p in network.parameters() if p.requires_grad]
        gradients = sum(p.nbytes for p in trained)
        summed = schedule.accumulate > 1
        if summed:  # they wait for the next part
            for p in trained:
                p.grad = torch.zeros_like(p)
        teacher = build_teacher(model, config)
        beside = {"teacher": teacher_of(teacher), "rival": rival}
        step = _allocated_by_a_step(model, config, data, measured, place, terms, beside)
    except torch.OutOfMemoryError as error:
        raise ToCoError(
            f"{device} has {free / GIB:.2f} GiB free, too little for {measured} images at a time: a larger accumulate, "
            f"a smaller crop_size or precision = 'bf16' is needed"
        ) from error
    weights = sum(value.nbytes for network in networks for value in (*network.parameters(), *network.buffers()))
    whole = schedule.batch_size // processes
    return StepMemory(
        device=str(device),
        batch_size=schedule.batch_size,
        images=images,
        equal_parts=tuple(n for n in range(schedule.accumulate, whole + 1) if whole % n == 0),
        gradients=gradients,
        fixed=(1 if teacher is None else 2) * weights + (2 + summed + (processes > 1)) * gradients,
        step=round(step * images / measured),
        free=free,
        precision=resolve_precision(config.precision, device),
    )


def _allocated_by_a_step(
    model: ToCo,
    config: TrainConfig,
    data: TrainVal,
    images: int,
    device: torch.device,
    terms: Mapping[str, Term],
    beside: Mapping[str, ToCo | None],
) -> int:
    """The most that one forward and backward pass holds at any time, without what was there before."""
    last = config.schedule.steps - 1
    config = override(config, batch_size=images, accumulate=1)
    (loaded,) = config_batches(data, config, model, stop_step=1)
    batch = to_device(loaded, model, device)
    options = {"generator": torch.Generator().manual_seed(0), "autocast": autocast_of(config, device)}
    with attention_of(model, config, device), Allocations() as counted:
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        backward(of_both, model, batch, config, last, terms=terms, **beside, **options)
        return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else counted.most


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while it is entered, until they are freed: `now`, and at most.

    It sees the backward pass on a CPU only: on CUDA that runs in a thread of its own.
    """

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.held: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # the same object for all views, as long as one of them lives
                if id(storage) not in self.held and id(storage) not in given:
                    self.held.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, name: int, size: int) -> None:
        self.held.discard(name)
        self.now -= size


def estimate_seconds(config: TrainConfig, data: TrainVal, *, terms: Mapping[str, Term] = TERMS) -> float:
    """About how long `train` will take here: three steps of each stage, a few images of the warm start and a few of the
    validation are measured; where tokens are kept, steps whose pictures are new and steps whose pictures are known."""
    device = resolve_device(config.device)
    model = build_model(config, data.train.n_classes).to(device).train()
    schedule, kept, store = config.schedule, kept_blocks(config), KeptTokens()
    model.freeze_blocks(schedule.frozen_blocks)
    autocast, rival = autocast_of(config, device), build_rival(model, config)
    beside = {"teacher": teacher_of(build_teacher(model, config)), "rival": rival}
    keep_freed_memory()
    starts = sorted({0, schedule.steps} | {s for s in stage_starts(config, terms) if s < schedule.steps})
    new_steps = config.data.views_per_image * -(-len(data.train) // schedule.batch_size) if kept else schedule.steps
    total = 0.0

    def seconds_of(batch: StepInput, number: int) -> float:
        began = _when_done(device)
        options = {"terms": terms, "generator": torch.Generator().manual_seed(0), "autocast": autocast}
        backward(of_both, model, batch, config, number, **beside, **options)
        for network in (model, rival):
            if network is not None:
                network.zero_grad(set_to_none=True)
        return _when_done(device) - began

    with (
        attention_of(model, config, device),
        store.of(model, blocks=kept),
        recorded_blocks(model, config),
        teaching(beside["teacher"], config, device, store),
        teaching(rival, config, device, store),
    ):
        batches = config_batches(data, config, model, stop_step=3 * len(starts))
        for first, last in zip(starts, starts[1:], strict=False):
            ready = [to_device(next(batches), model, device) for _ in range(3)]
            new = min(seconds_of(batch, first) for batch in ready)
            known = min(seconds_of(batch, first) for batch in ready) if kept else new
            n_new = min(max(new_steps - first, 0), last - first)
            total += new * n_new + known * (last - first - n_new)
        if schedule.warm_start_steps:
            few = data.train.subset(range(min(8, len(data.train))))
            began = time.perf_counter()
            pooled_tokens(model, few, config, autocast=autocast, progress=False)
            total += (time.perf_counter() - began) * len(data.train) / len(few) * (1 if rival is None else 2)
        few = data.val.subset(range(min(8, len(data.val))))
        began = time.perf_counter()
        evaluate_as(config, model, few, progress=False)
        validations = -(-schedule.steps // config.eval_interval) if config.eval_interval else 1
        total += validations * (time.perf_counter() - began) * len(data.val) / len(few)
    return total


def _when_done(device: torch.device) -> float:
    """The clock, in seconds, when all that was queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
