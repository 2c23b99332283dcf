"""The second stage: a segmentation network trained on label maps as if they were true, for instance exported ones.

In the single stage of ToCo the decoder learns while its labels are still moving. Afterwards they stand still, so an
ordinary supervised training can begin anew from the pretrained backbone: cross-entropy, 255 ignored.

    toco second runs/<run> my_labels my_second         # backbone and sizes as that run, label maps of `my_labels`
    toco label my_second new_photographs new_labels    # by its decoder, all that was trained

`my_labels` is a folder of `toco_core.predict.export` or of `toco label`; its label maps may have been edited, with any
program that keeps the numbers of a palette PNG. All of it is looked at before the first step. Stopped by Ctrl-C or an
error, the same command goes on where it was.
"""

import contextlib
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from tqdm import tqdm

from toco_core.config import TrainConfig
from toco_core.conventions import IGNORE
from toco_core.data import Split, TrainVal, to_unit
from toco_core.data.augment import scaled_range
from toco_core.data.fingerprint import split_fingerprint
from toco_core.data.loader import sample_order
from toco_core.errors import BrokenFile, ToCoError
from toco_core.machine.device import resolve_device
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.machine.writing import writing
from toco_core.model import ToCo
from toco_core.runs.folder import Run
from toco_core.runs.opened import load_model_state
from toco_core.train.interruptions import StepGuard, saved_when_stopped, with_resume_hint
from toco_core.train.optimizer import build_training, load_optimizer_state, set_rates


def train_segmentation(
    config: TrainConfig,
    source: Split,
    *,
    steps: int | None = None,
    progress: bool = True,
    folder: Path | str | None = None,
    save_minutes: float = 5.0,
) -> ToCo:
    """A network whose decoder was trained on the masks of a split; the classifiers stay as they begin.

    Backbone, sizes, rates, batch and seed are those of `config`; `steps` stands for `config.schedule.steps`. Scores by
    `evaluate`, whose `seg` is what was trained.

    folder: gets a checkpoint every `save_minutes`, at the end, and whatever stops the training between two steps; the
        same call goes on from it, with the same bits as an uninterrupted one.

    Raises ToCoError for a split without masks, before the first step for an image or mask that cannot be used and for a
    checkpoint of another training, and for a loss that is not finite.
    """
    if source.n_masks < len(source):
        raise ToCoError(f"{source!r} has masks of {source.n_masks} images only: supervised training needs all")
    source.check(progress=progress)
    steps, device = steps or config.schedule.steps, resolve_device(config.device)
    model, optimizer = build_training(config, source.n_classes, device)
    kept = None if folder is None else _Checkpoint(Run(folder), config, source, steps)
    start = 0 if kept is None else kept.load(model, optimizer)
    model.train()
    autocast, guard = autocast_of(config, device), StepGuard(start)
    with contextlib.ExitStack() as stack:
        stack.enter_context(attention_of(model, config, device))
        if kept is not None:
            stack.enter_context(with_resume_hint(kept.run))
            stack.enter_context(guard)
            stack.enter_context(saved_when_stopped(guard, kept.run, lambda done: kept.save(done, model, optimizer)))
        saved_at = time.monotonic()
        bar = {"desc": "supervised", "unit": "step", "initial": start, "total": steps, "disable": not progress}
        for step in tqdm(range(start, steps), **bar, file=sys.stdout):
            set_rates(optimizer, config, step, steps=steps)
            images, labels = (part.to(device) for part in _batch(source, config, step))
            guard.begin()
            with autocast():
                logits = model(model.normalise(to_unit(images))).seg_logits
            logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
            loss = loss / (labels != IGNORE).sum().clamp(min=1)
            if not torch.isfinite(loss):
                raise ToCoError(f"the loss is {float(loss)} on step {step}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            guard.end(step + 1)
            if kept is not None and (step + 1 == steps or time.monotonic() - saved_at > 60 * save_minutes):
                kept.save(step + 1, model, optimizer)
                saved_at = time.monotonic()
    return model.eval()


class _Checkpoint:
    """What a training of a second network goes on from, and what it depends on."""

    def __init__(self, run: Run, config: TrainConfig, source: Split, steps: int):
        self.run, self.data = run, TrainVal(source, source, False)
        files = split_fingerprint(source)
        facts = {name: files[name] for name in ("names", "classes", "images", "masks", "drawing") if name in files}
        self.settings = {"config": config.short_hash(), "steps": steps, **facts}

    def load(self, model: ToCo, optimizer: torch.optim.Optimizer) -> int:
        """How many steps the checkpoint, which is taken over, has done. Raises ToCoError for that of another
        training."""
        state = self.run.load() if self.run.begun else None
        if state is None:
            return 0
        known = state.get("settings")
        known = known if isinstance(known, dict) else {}
        if other := [name for name, value in self.settings.items() if known.get(name) != value]:
            path = self.run.folder / "checkpoint.pt"
            raise ToCoError(
                f"{path} is of a training with other {', '.join(other)}: remove it to begin anew, or take a new folder"
            )
        load_model_state(model, state["model"], self.run, self.data)
        load_optimizer_state(optimizer, state["optimizer"], self.run)
        return state["step"]

    def save(self, done: int, model: ToCo, optimizer: torch.optim.Optimizer) -> None:
        """Replace the checkpoint."""
        with writing(self.run.folder):
            self.run.folder.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "settings": self.settings}
        self.run.save(state | {"step": done})


def crop_with_mask(
    image: UInt8[np.ndarray, "h w 3"],
    mask: UInt8[np.ndarray, "h w"],
    *,
    crop_size: int,
    scale_range: tuple[float, float],
    scale_relative: bool = False,
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
    """Both rescaled, flipped half of the time, cut at a random place, padded with black and 255 where they are small.

    H = W = `crop_size`. Labels are never mixed: the mask takes the nearest pixel. `scale_relative` as in
    `augment.training_views`.
    """
    if scale_relative:
        scale_range = scaled_range(scale_range, mask.shape, (crop_size, crop_size))
    scale = rng.uniform(*scale_range)
    height, width = (max(1, round(side * scale)) for side in mask.shape)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    if rng.random() < 0.5:
        image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
    cut, margins = [], []
    for side in (height, width):
        start = int(rng.integers(max(side - crop_size, 0) + 1))
        before = int(rng.integers(max(crop_size - side, 0) + 1))
        cut.append(slice(start, start + crop_size))
        margins += [before, max(crop_size - side, 0) - before]
    image = cv2.copyMakeBorder(image[tuple(cut)], *margins, borderType=cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return image, cv2.copyMakeBorder(mask[tuple(cut)], *margins, borderType=cv2.BORDER_CONSTANT, value=IGNORE)


def _batch(source: Split, config: TrainConfig, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (uint8 B 3 H W) and labels (B H W) of a step; they follow from (seed, step)."""
    images, masks = [], []
    for position in range(step * config.schedule.batch_size, (step + 1) * config.schedule.batch_size):
        index = int(sample_order(len(source), config.seed, position // len(source))[position % len(source)])
        try:
            pair = source.pair(index)
        except ToCoError as error:
            raise BrokenFile(error) from error
        image, mask = crop_with_mask(
            *pair,
            crop_size=config.data.crop_size,
            scale_range=config.data.scale_range,
            scale_relative=config.data.scale_relative,
            rng=np.random.default_rng((config.seed, 2, position)),
        )
        images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
        masks.append(torch.from_numpy(mask).long())
    return torch.stack(images), torch.stack(masks)
