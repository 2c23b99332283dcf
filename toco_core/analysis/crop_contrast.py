"""What class token contrast teaches: crops that show the object are closer to the whole image than crops that do not.

Three numbers tell whether it does, for one network: `gap` and `auc` of what the head makes of crops full of objects
over those of background, and `likeness` of crops of different images. Where CTC has collapsed, all crops lie in one
direction, whatever they show: likeness near 1, an AUC near 0.5, and a gap of either sign.

Crops are cut anywhere in the image and judged by the mask, not by the CAM that chose and flagged crops in training; so
a model cannot look good by agreeing with its own mistakes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toco_core.analysis.crop_audit import foreground_share, separation
from toco_core.config import TrainConfig
from toco_core.crops import CropBoxes, local_views, sample_crops
from toco_core.data import evaluation_items, to_unit
from toco_core.errors import ToCoError
from toco_core.model import ToCo


class CropContrast(NamedTuple):
    """Crops of a split, one row of V crops per image."""

    object_share: Float[Tensor, "B V"]
    """Share of object among the crop's pixels that are not 255, by the mask; NaN where all are."""
    class_token: Float[Tensor, "B V"]
    """Cosine similarity of the crop's class token with the whole image's."""
    projected: Float[Tensor, "B V"]
    """The same of the student's projection of the crop and the teacher's of the image: what CTC trains."""
    logit: Float[Tensor, "B V"]
    """Their product over the temperature, as CTC takes it: of unit vectors where `ctc_cosine`."""
    direction: Float[Tensor, "B V P"]
    """The student's projection of the crop, at length 1."""

    def gap(self, values: Float[Tensor, "B V"], *, at_least: float = 0.25, at_most: float = 0.0) -> float:
        """Mean of `values` over crops with at least this share of object minus that over crops with at most so much.

        Positive: crops of objects have the higher values. NaN where there are no crops of one of the two kinds.
        """
        return float(values[self.object_share >= at_least].mean() - values[self.object_share <= at_most].mean())

    def auc(self, values: Float[Tensor, "B V"], *, at_least: float = 0.6, at_most: float = 0.05) -> float:
        """The chance that a crop with at least this share of object has a higher value than one with at most so much.

        1: every crop of an object lies above every one of background; 0.5: the values do not tell; 0: below. NaN where
        there are no crops of one of the two kinds.
        """
        shows, empty = values[self.object_share >= at_least], values[self.object_share <= at_most]
        return separation(shows.tolist(), empty.tolist())

    def likeness(self) -> float:
        """Mean cosine of the projections of crops of different images, in [-1, 1]; 1: all have collapsed into one.

        NaN for a single image.
        """
        B, V, _ = self.direction.shape
        of_images = self.direction.sum(1)  # the sum over pairs of images, without a matrix of all pairs of crops
        pairs = of_images.sum(0).square().sum() - of_images.square().sum()
        return float(pairs / (V * V * B * (B - 1))) if B > 1 else math.nan


@torch.no_grad()
def crop_contrast(
    model: ToCo, source, config: TrainConfig, *, n_images: int = 32, n_crops: int = 12, seed: int = 0
) -> CropContrast:
    """Compare crops of `local_size`, cut anywhere, with the first `n_images` of a split, each at `crop_size` square.

    Crops are encoded and projections compared as `config` trains them (`local_resized`, `ctc_cosine`). Raises
    ToCoError for an image without mask.
    """
    side, device = config.data.crop_size, model.classifier.weight.device
    generator, rows = torch.Generator().manual_seed(seed), []
    for item in evaluation_items(source.subset(range(min(n_images, len(source)))), size=side):
        if item.mask is None:
            raise ToCoError(f"{item.name} has no mask: it tells which crops show the object")
        mask = F.interpolate(torch.from_numpy(item.mask)[None, None].float(), size=(side, side), mode="nearest").long()
        boxes = sample_crops(
            torch.zeros_like(mask[0]), n_crops=n_crops, crop_size=config.crops.local_size, generator=generator
        )
        images = model.normalise(to_unit(item.image.to(device)))
        boxes = CropBoxes(*(corner.to(device) for corner in boxes))
        crops = local_views(images, boxes, config.crops.local_size, resized=config.crops.local_resized)
        whole, parts = model.encode(images).class_token, model.encode(crops[0]).class_token
        student, teacher = model.project(parts).float(), model.project_ema(whole).float()
        cosine = F.cosine_similarity(student, teacher)
        product = cosine if config.loss.ctc_cosine else (student @ teacher.T)[:, 0]
        rows.append(
            (
                foreground_share(mask[0].to(device), *boxes, config.crops.local_size)[0],
                F.cosine_similarity(parts, whole),
                cosine,
                product / config.loss.temperature,
                F.normalize(student, dim=1),
            )
        )
    return CropContrast(*(torch.stack(column).cpu() for column in zip(*rows, strict=True)))
