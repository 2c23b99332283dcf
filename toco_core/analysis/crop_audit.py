"""What the crops of class token contrast really show, by the masks that training never sees.

CTC calls a crop positive when the CAM's region mask finds enough uncertain or foreground pixels in it. The audit draws
crops as training does, on images that are neither varied nor padded so that their masks fit, and compares each flag
with the share of the crop that belongs to an object. `look_at_crops` shows the same for one image, down to the
logits that the loss contrasts.

The images are those of `label_quality.cams_of_split`; only the auxiliary CAM is used, as in training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer, UInt8
from torch import Tensor

from toco_core.analysis.label_quality import ImageCAMs
from toco_core.config import TrainConfig
from toco_core.conventions import IGNORE
from toco_core.crops import CropBoxes, cut_crops, foreground_ratio, local_views, sample_crops
from toco_core.data import training_views
from toco_core.errors import ToCoError
from toco_core.labels import region_mask
from toco_core.model import ToCo
from toco_core.train.batches import view_options


def foreground_share(
    mask: Integer[Tensor, "B H W"], top: Int[Tensor, "B V"], left: Int[Tensor, "B V"], crop_size: int
) -> Float[Tensor, "B V"]:
    """The share of each crop's pixels that belong to an object, by the mask (0 background, 1..K, 255 void).

    Void pixels do not count; NaN where a crop holds nothing else.
    """
    known = mask != IGNORE
    of_both = torch.stack([known & (mask > 0), known, known], dim=1).float()
    objects, seen, _ = cut_crops(of_both, top, left, crop_size).sum((-2, -1)).unbind(-1)
    return objects / seen


class DrawnCrops(NamedTuple):
    """R times V crops of each of I images."""

    ratio: Float[Tensor, "I R V"]  # mean of the region values, what the flag is decided by
    share: Float[Tensor, "I R V"]  # of the crop that belongs to an object; NaN where all is void


def draw_crops(
    items: Sequence[ImageCAMs], config: TrainConfig, *, draws: int = 4, seed: int = 0, mirrored: bool = False
) -> DrawnCrops:
    """Draw `n_local` crops of every image, `draws` times, by the thresholds and sizes of `config`.

    `mirrored` looks at the mask of the mirrored place: what a crop shows where image and region mask are flipped
    independently of each other, as happens to half of the images with `ReleaseBehaviour.independent_local_image`.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    size = config.crops.local_size
    for item in items:
        region, boxes, ratio = _drawn(item, config, generator, draws)
        mask = mask_at(item).to(region.device).expand(draws, -1, -1)
        left = mask.shape[2] - size - boxes.left if mirrored else boxes.left
        found.append((ratio, foreground_share(mask, boxes.top, left, size)))
    if not found:
        raise ToCoError("no image to draw crops from: at least one is needed")
    return DrawnCrops(*(torch.stack(part).cpu() for part in zip(*found, strict=True)))


def _drawn(
    item: ImageCAMs, config: TrainConfig, generator: torch.Generator, draws: int
) -> tuple[Integer[Tensor, "R H W"], CropBoxes, Float[Tensor, "R V"]]:
    """Region mask, places and mean region values of crops, as training draws them."""
    size, double = config.crops.local_size, config.release.foreground_counts_double
    region = region_mask(item.aux_cam, item.present, **config.labels.thresholds()).expand(draws, -1, -1)
    boxes = sample_crops(region, n_crops=config.crops.n_local, crop_size=size, generator=generator)
    return region, boxes, foreground_ratio(region, *boxes, size, foreground_counts_double=double)


def mask_at(item: ImageCAMs) -> UInt8[Tensor, "1 H W"]:
    """The mask at the size of the CAMs (nearest pixel)."""
    return F.interpolate(torch.from_numpy(item.mask.copy())[None, None], size=item.unit.shape[2:], mode="nearest")[0]


class CropScores(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to divide by."""

    positive: float  # of all crops, those flagged positive
    positive_right: float  # of the positive crops, those that show an object
    negative_right: float  # of the negative crops, those that do not
    shows_object: float  # of all crops: what positive_right is where flags say nothing
    images_with_positive: float  # of all draws, those with a positive crop
    images_with_negative: float  # of all draws, those with a negative crop


def crop_scores(drawn: DrawnCrops, *, threshold: float, least: float) -> CropScores:
    """Judge the flags `ratio > threshold` by whether more than `least` of a crop belongs to an object.

    Crops that are void entirely count only for `positive` and the images.
    """
    flag, known, shown = drawn.ratio > threshold, ~drawn.share.isnan(), drawn.share > least

    def share(of: Tensor, among: Tensor) -> float:
        return float((of & among).sum() / among.sum())

    everything = torch.ones_like(flag)
    return CropScores(
        positive=share(flag, everything),
        positive_right=share(shown, flag & known),
        negative_right=share(~shown, ~flag & known),
        shows_object=share(shown, known),
        images_with_positive=float(flag.any(-1).float().mean()),
        images_with_negative=float((~flag).any(-1).float().mean()),
    )


class ImageCrops(NamedTuple):
    """The local views of one image and what CTC contrasts."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]  # as the model saw it: the first global view
    global_view: UInt8[np.ndarray, "H W 3"]  # the second, drawn as in training
    mask: UInt8[np.ndarray, "H W"]
    aux_cam: Float[np.ndarray, "H W"]  # largest value among the labelled classes
    region: Integer[np.ndarray, "H W"]  # 0 background, 1 uncertain, 2 foreground
    boxes: CropBoxes  # 1 V: top, left
    crops: UInt8[np.ndarray, "V s s 3"]
    ratio: Float[Tensor, " V"]  # mean of the region values in each crop
    share: Float[Tensor, " V"]  # of the crop that belongs to an object, by the mask
    is_positive: Bool[Tensor, " V"]
    logits: Float[Tensor, "V2 2"]  # see `contrast_logits`: two global views, then the V local ones


@torch.no_grad()
def look_at_crops(model: ToCo, item: ImageCAMs, config: TrainConfig, *, seed: int = 0) -> ImageCrops:
    """Draw the local views of one image and compare their class tokens with those of the global views.

    As in a training step of `config`, but the image and its local views are neither varied nor padded.
    """
    size, (height, width) = config.crops.local_size, item.unit.shape[2:]
    region, boxes, ratio = _drawn(item, config, torch.Generator().manual_seed(seed), 1)
    mask = mask_at(item)

    rng = np.random.default_rng(seed)
    varied = training_views(item.image, crop_size=(height, width), rng=rng, **view_options(config, model))
    second = torch.from_numpy(varied.global_view)[None].to(item.unit) / 255
    crops = cut_crops(item.unit, *boxes, size)[0]
    encoded = local_views(item.unit, boxes, size, resized=config.crops.local_resized)[0]
    options = {"temperature": config.loss.temperature, "cosine": config.loss.ctc_cosine}
    logits = contrast_logits(model, torch.cat([item.unit, second]), encoded, **options)
    strongest = item.aux_cam[0].amax(0) if len(item.classes) else torch.zeros(height, width)
    return ImageCrops(
        name=item.name,
        image=_picture(item.unit)[0],
        global_view=_picture(second)[0],
        mask=mask[0].numpy(),
        aux_cam=strongest.cpu().numpy(),
        region=region[0].cpu().numpy(),
        boxes=CropBoxes(boxes.top.cpu(), boxes.left.cpu()),
        crops=_picture(crops),
        ratio=ratio[0].cpu(),
        share=foreground_share(mask, boxes.top.cpu(), boxes.left.cpu(), size)[0],
        is_positive=(ratio > config.crops.positive_threshold)[0].cpu(),
        logits=logits,
    )


@torch.no_grad()
def contrast_logits(
    model: ToCo,
    global_views: Float[Tensor, "2 3 H W"],
    crops: Float[Tensor, "V 3 s t"],
    *,
    temperature: float,
    cosine: bool = False,
) -> Float[Tensor, "V2 2"]:
    """student . teacher / temperature: what CTC ("Class Token Contrast", InfoNCE) puts into its exponentials.

    Rows: the two global views, then the V local ones, their class tokens through the student's head. Columns: the
    global views through the teacher's head; `cosine`: of length 1 (`ctc_cosine`). Views in [0, 1].
    """
    tokens = model.encode(model.normalise(global_views)).class_token
    local = model.encode(model.normalise(crops)).class_token
    student, teacher = model.project(torch.cat([tokens, local])), model.project_ema(tokens)
    if cosine:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (student @ teacher.T / temperature).float().cpu()


def separation(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive crop has a higher value than a negative one (area under the ROC curve): 0.5 where the
    values do not tell them apart. NaN where one kind is missing."""
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    difference = positive[:, None] - negative[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean()) if difference.size else float("nan")


def _picture(images: Float[Tensor, "B 3 H W"]) -> UInt8[np.ndarray, "B H W 3"]:
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
