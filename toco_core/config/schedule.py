"""Optimizer, rates, and what is trained for how long."""

from dataclasses import dataclass

from toco_core.config.fields import Config, option
from toco_core.errors import ToCoError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Optimiser and learning rate (see `lr_at`)."""

    steps: int = option(20000, "Training steps.", at_least=1)
    batch_size: int = option(4, "Images per step, over all devices.", at_least=1)
    accumulate: int = option(
        1,
        """Equal parts into which each process cuts its images of a step, computed one after the other where memory is
        short. Losses and gradients stay those of `batch_size` images in one piece.""",
        at_least=1,
        added_later=True,
    )
    compile_blocks: bool = option(
        False,
        """Train with the encoder's blocks compiled by torch.compile, once for each size of view: minutes before the
        first step, for steps that a GPU waits less in. Values differ in their last bits.""",
        added_later=True,
    )
    cuda_graphs: bool = option(
        True,
        """On a GPU, record the encoder's blocks once for each size of view and replay them: the same kernels, without
        waiting for the host that launches them, for a quarter more of the GPU's memory. Nothing happens elsewhere, nor
        where `accumulate` or several processes divide a batch.""",
        added_later=True,
    )
    lr: float = option(6e-5, "Base learning rate of the encoder.", above=0)
    head_lr_scale: float = option(10.0, "The rate of the heads is this many times the encoder's.", above=0)
    classifier_lr_scale: float | None = option(
        None,
        """The same for the two classifiers. None: `head_lr_scale`, as published. A larger one lets them settle on the
        pretrained tokens before the encoder bends these to whatever tells a small data set's classes apart.""",
        above=0,
        added_later=True,
    )
    warm_start_steps: int = option(
        0,
        """Steps of 64 images in which the two classifiers alone are fitted to the frozen tokens of all training images
        before training begins: random heads would bend pretrained tokens (Kumar et al., ICLR 2022). Costs one pass over
        the images. 0: none, as published.""",
        at_least=0,
        added_later=True,
    )
    frozen_blocks: int = option(
        0,
        "The patch embedding and so many first blocks stay as they are. 0: everything is trained, as published.",
        at_least=0,
        added_later=True,
    )
    weight_decay: float = option(0.01, "Decoupled weight decay of AdamW.", at_least=0)
    betas: tuple[float, ...] = option((0.9, 0.999), "Moments of AdamW.", length=2, at_least=0, below=1)
    warmup_steps: int = option(1500, "Steps of linear warm-up.", at_least=0)
    warmup_ratio: float = option(1e-6, "Rate on step 0 as a fraction of the base rate.", at_least=0, at_most=1)
    power: float = option(0.9, "Power of the polynomial decay.", above=0)
    momentum: float = option(
        0.9, "Momentum of the projection head's moving average (the teacher's head).", at_least=0, at_most=1
    )
    teacher_momentum: float = option(
        0.0,
        """Momentum of a moving average of the whole network, whose CAMs then make all labels (see `train.teacher`). It
        costs a second network and one more pass of the images. 0: none, as published.""",
        at_least=0,
        below=1,
        added_later=True,
    )

    def check(self):
        if self.warmup_steps > self.steps:
            raise ToCoError(f"warmup_steps = {self.warmup_steps} must be at most steps = {self.steps}")
        self.images_at_once()

    def progress(self, step: int) -> float:
        """Share of the training that lies before a step: 0 on step 0, 1 after the last one."""
        return min(step / self.steps, 1.0)

    def images_at_once(self, processes: int = 1) -> int:
        """Images whose graph a process holds at a time. Raises ToCoError where the parts would not be equal."""
        if self.batch_size % (processes * self.accumulate):
            among = f" x {processes} processes" if processes > 1 else ""
            raise ToCoError(f"accumulate = {self.accumulate}{among} must divide batch_size = {self.batch_size}")
        return self.batch_size // (processes * self.accumulate)


def lr_at(
    step: int,
    *,
    base_lr: float,
    steps: int,
    warmup_steps: int,
    warmup_ratio: float,
    power: float,
    rate_jump: bool = True,
) -> float:
    """Learning rate used on `step` (0 <= step <= steps): linear warm-up, then polynomial decay to 0 at `steps`.

    Warm-up goes from `warmup_ratio` * base_lr on step 0 to base_lr at `warmup_steps`. With `rate_jump`, as in the
    release, the decay (1 - step / steps) ** power counts from step 0, so the rate falls suddenly when the warm-up ends;
    without, it counts from there.
    """
    if not 0 <= step <= steps:
        raise ToCoError(f"step = {step} is outside the schedule: allowed are 0..{steps}")
    if step < warmup_steps:
        return base_lr * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))
    if rate_jump:
        return base_lr * (1 - step / steps) ** power
    return base_lr * (1 - (step - warmup_steps) / max(steps - warmup_steps, 1)) ** power
