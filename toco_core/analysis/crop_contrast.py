"""What class token contrast teaches: crops that show the object are closer to the whole image than crops that do not.

Crops are cut anywhere in the image and judged by the mask, not by the CAM that chose and flagged crops in training; so
a model cannot look good by agreeing with its own mistakes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.conventions import IGNORE
from toco_core.crops import CropBoxes, cut_crops, sample_crops
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

    def gap(self, values: Float[Tensor, "B V"], *, at_least: float = 0.25) -> float:
        """Mean of `values` over crops with at least this share of object minus that over crops without any.

        NaN where there are no crops of one of the two kinds.
        """
        shows, empty = self.object_share >= at_least, self.object_share == 0
        return float(values[shows].mean() - values[empty].mean())


@torch.no_grad()
def crop_contrast(
    model: ToCo, source, config: TrainConfig, *, n_images: int = 32, n_crops: int = 12, seed: int = 0
) -> CropContrast:
    """Compare crops of `local_size`, cut anywhere, with the first `n_images` of a split, each at `crop_size` square.

    Raises ToCoError for an image without mask.
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
        crops = cut_crops(images, *boxes, config.crops.local_size)
        whole, parts = model.encode(images).class_token, model.encode(crops[0]).class_token
        rows.append(
            (
                object_share(mask[0, 0].to(device), boxes, config.crops.local_size),
                F.cosine_similarity(parts, whole),
                F.cosine_similarity(model.project(parts), model.project_ema(whole)),
            )
        )
    return CropContrast(*(torch.stack(column).cpu() for column in zip(*rows, strict=True)))


def object_share(mask: Tensor, boxes: CropBoxes, crop_size: int) -> Tensor:
    """Per crop of one H W mask the share of 1..K among the pixels that are not 255; NaN where all are."""
    seen, truth = (mask != IGNORE).float(), ((mask != IGNORE) & (mask != 0)).float()
    both = cut_crops(torch.stack([truth, seen, seen])[None], *boxes, crop_size)[0].sum((2, 3))
    return both[:, 0] / both[:, 1]
