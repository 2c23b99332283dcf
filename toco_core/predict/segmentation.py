"""The decoder's maps over scales, merged to one label map, and the settings of the CRF behind them."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toco_core.cam import scaled
from toco_core.config import did_you_mean
from toco_core.data import to_unit
from toco_core.data.augment import resize
from toco_core.errors import ToCoError
from toco_core.labels import merged_argmax, upsampled_argmax
from toco_core.model import ToCo
from toco_core.refiners.crf import CRFSettings, dense_crf

CRF_PIXELS = 1_000_000
"""Pixels of an image at most in its dense CRF: memory grows with them, to 17 GB for 24 megapixels, and its distances
are chosen for photographs of VOC, 375 x 500."""


def segmentation_maps(model: ToCo, images: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """Per scale the decoder's logits of the (normalised) images plus, turned back, those of the mirrored ones."""
    maps = []
    for scale in scales:
        views = scaled(model, images, scale)
        straight, mirrored = model(torch.cat([views, views.flip(-1)])).seg_logits.chunk(2)
        maps.append(straight + mirrored.flip(-1))
    return maps


def maps_at(model: ToCo, images: Sequence[Tensor], size: int | None, scales: Sequence[float]) -> list[list[Tensor]]:
    """Segmentation maps of images of native size (uint8 1 3 h w), stretched to `size`; equal shapes go together."""
    device, together, maps = model.classifier.weight.device, {}, [None] * len(images)
    for i, image in enumerate(images):
        together.setdefault(tuple(image.shape[-2:]) if size is None else size, []).append(i)
    for numbers in together.values():
        parts = [images[i] if size is None else stretched(images[i], size) for i in numbers]
        views = model.normalise(to_unit(torch.cat(parts).to(device)))
        once = tuple(scales) == (1.0,)
        group = [model(views).seg_logits] if once else segmentation_maps(model, views, scales)
        for place, i in enumerate(numbers):
            maps[i] = [m[place : place + 1] for m in group]
    return maps


def stretched(image: Tensor, size: int) -> Tensor:
    """A uint8 image (1 3 h w) at `size` square, as `data.evaluation_items` does it."""
    return torch.from_numpy(resize(image[0].permute(1, 2, 0).numpy(), size, size)).permute(2, 0, 1)[None]


def merged_label(maps: Sequence[Tensor], size: Sequence[int], *, max_over_scales: bool = True) -> Tensor:
    """B H W labels 0..K at `size` from one or more B C h w logits: per class the maximum over scales, as published, or
    their mean, then the strongest class."""
    return merged_argmax([m.float() for m in maps], size, max_over_scales=max_over_scales)


def crf_label(logits: Tensor, unit: Tensor, options: Mapping) -> Tensor:
    """1 H W labels after the dense CRF of logits (1 C H W) on their image (1 3 H W in [0, 1]).

    An image of more than `CRF_PIXELS` is refined at about so many, and the probabilities are brought back to its size.
    """
    size = (H, W) = tuple(logits.shape[-2:])
    if H * W <= CRF_PIXELS:
        return dense_crf(logits[0].softmax(0), unit[0], **options).argmax(0)[None]
    share = (CRF_PIXELS / (H * W)) ** 0.5
    small = tuple(max(1, round(side * share)) for side in size)
    logits = F.interpolate(logits, size=small, mode="bilinear", align_corners=False)
    probs = dense_crf(logits[0].softmax(0), F.interpolate(unit, size=small, mode="area")[0], **options)
    return upsampled_argmax(probs[None].contiguous(), size)


def checked_crf(crf: bool | Mapping) -> dict | None:
    """Settings of `dense_crf`, defaults included; None without CRF. Raises ToCoError for an unknown one."""
    if crf is False:
        return None
    known = dataclasses.asdict(CRFSettings())
    given = {} if crf is True else dict(crf)
    for name, value in given.items():
        if name not in known:
            raise ToCoError(f"crf has no setting {name!r}{did_you_mean(name, known)}")
        if name.endswith("sigma") or "_sigma_" in name:
            if not value > 0:
                raise ToCoError(f"crf: {name} = {value!r} must be above 0")
        elif not value >= 0:
            raise ToCoError(f"crf: {name} = {value!r} must be at least 0")
    return known | given


def crf_named(options: Mapping | None) -> str:
    """The settings of a CRF in words."""
    if options is None:
        return "no CRF"
    o = {name: f"{value:g}" for name, value in options.items()}
    return (
        f"dense CRF ({o['iterations']} iterations, position {o['position_weight']} of {o['position_sigma']} px, "
        f"appearance {o['appearance_weight']} of {o['appearance_sigma_xy']} px and {o['appearance_sigma_rgb']} levels)"
    )
