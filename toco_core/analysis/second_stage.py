"""The second stage: a segmentation network trained on label maps as if they were true, for instance exported ones.

In the single stage of ToCo the decoder learns while its labels are still moving. Afterwards they stand still, so an
ordinary supervised training can begin anew from the pretrained backbone: cross-entropy, 255 ignored.

    toco second runs/<run> my_labels my_second         # backbone and sizes as that run, label maps of `my_labels`
    toco label my_second new_photographs new_labels    # by its decoder, all that was trained

`my_labels` is a folder of `toco_core.predict.export` or of `toco label`; its label maps may have been edited, with any
program that keeps the numbers of a palette PNG.
"""

import sys

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from tqdm import tqdm

from toco_core.config import TrainConfig
from toco_core.conventions import IGNORE
from toco_core.data import Split, to_unit
from toco_core.data.augment import scaled_range
from toco_core.data.loader import sample_order
from toco_core.errors import ToCoError
from toco_core.machine.device import resolve_device
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.model import ToCo
from toco_core.train.optimizer import build_training, set_rates


def train_segmentation(config: TrainConfig, source: Split, *, steps: int | None = None, progress: bool = True) -> ToCo:
    """A network whose decoder was trained on the masks of a split; the classifiers stay as they begin.

    Backbone, sizes, rates, batch and seed are those of `config`; `steps` stands for `config.schedule.steps`. Scores by
    `evaluate`, whose `seg` is what was trained. Raises ToCoError for a split without masks and for a loss that is not
    finite.
    """
    if source.n_masks < len(source):
        raise ToCoError(f"{source!r} has masks of {source.n_masks} images only: supervised training needs all")
    steps, device = steps or config.schedule.steps, resolve_device(config.device)
    model, optimizer = build_training(config, source.n_classes, device)
    model.train()
    autocast = autocast_of(config, device)
    with attention_of(model, config, device):
        for step in tqdm(range(steps), desc="supervised", unit="step", disable=not progress, file=sys.stdout):
            set_rates(optimizer, config, step, steps=steps)
            images, labels = (part.to(device) for part in _batch(source, config, step))
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
    return model.eval()


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
        image, mask = crop_with_mask(
            *source.pair(index),
            crop_size=config.data.crop_size,
            scale_range=config.data.scale_range,
            scale_relative=config.data.scale_relative,
            rng=np.random.default_rng((config.seed, 2, position)),
        )
        images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
        masks.append(torch.from_numpy(mask).long())
    return torch.stack(images), torch.stack(masks)
