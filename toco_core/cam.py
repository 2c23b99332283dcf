"""Class activation maps.

Paper, "Preliminary": CAM of a class is the classifier's weight of that class applied at every patch token.
Negative values are cut off and each map is brought to [0, 1] over the image. The auxiliary CAM is the same with the
tokens of block `layer` and the auxiliary classifier.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from .errors import ToCoError
from .model import ToCo, Tokens
from .refiners.attention import carried, token_affinity

EPSILON = 1e-5  # added to a map's maximum: a map without any activation stays 0


class CAMs(NamedTuple):
    """Maps in [0, 1] at image size."""

    cam: Float[Tensor, "B K H W"]
    aux_cam: Float[Tensor, "B K H W"]


class LabelledCAMs(NamedTuple):
    """CAMs of the classes that images have, and of no others: what many classes cost nothing in."""

    cams: CAMs
    """B k H W, k the most classes of any image; a slot that an image does not fill is 0."""
    classes: Int[Tensor, "B k"]
    """0..K-1 of each slot, ascending, on the maps' device; 0 where it is not filled."""
    present: Bool[Tensor, "B k"]
    """Which slots are filled, where the image labels are: it stands for them in the functions of `labels`."""


def class_activation(patch_map: Float[Tensor, "B D h w"], weight: Float[Tensor, "K D"]) -> Float[Tensor, "B K h w"]:
    """Raw CAM at the patch grid: the classifier's `weight` applied at every token; negative values are kept.

    A 1 x 1 convolution on contiguous maps, because it then rounds exactly as the release does.
    """
    return F.conv2d(patch_map.contiguous(), weight[:, :, None, None])


def normalise_cam(cam: Float[Tensor, "M H W"]) -> Float[Tensor, "M H W"]:
    """Bring each map to [0, 1): subtract its minimum, divide by its maximum (plus EPSILON)."""
    cam = cam - cam.amin(dim=(-2, -1), keepdim=True)
    return cam / (cam.amax(dim=(-2, -1), keepdim=True) + EPSILON)


@torch.no_grad()
def multi_scale_cam(
    model: ToCo,
    images: Float[Tensor, "B 3 H W"],
    *,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
    tokens: Tokens | None = None,
    image_labels: Num[Tensor, "B K"] | None = None,
    attention_steps: int = 0,
    attention_blocks: Sequence[int] = (),
    attention_kind: str = "attention",
) -> CAMs:
    """CAM and auxiliary CAM, summed over scales of the (normalised) images.

    Each scale contributes relu(max(map, map of the mirrored image)) after bilinear resizing to H x W; the sum is
    normalised per image and class. Without `flip` the mirrored image is left out.

    tokens: `model.encode(images)` where it is at hand; it serves as the unflipped scale 1, so that pass is not
    repeated.
    image_labels: B K in {0, 1}. Only maps of labelled classes are made; the others are 0, which is what
    `labels.valid_cam` would make of them. Without it, all K. Which classes those are is looked up where the labels
    are: for labels on the CPU no device is waited for.

    attention_steps: carry the activations of every view so often along its own attention, at the tokens, before they
    are resized (see `refiners.attention`, also for `attention_kind`). `tokens` should then come from
    `model.encode(images, attend=attention_blocks)`; otherwise that pass is repeated.

    No gradient, no decoder. Without attention steps it equals the release (which always includes scale 1) when
    `model.dropped_border`, to 3e-6 with fused attention and to 3e-7 within `model.plain_attention()`; otherwise a
    scaled image whose size is not a multiple of the patch is fitted to the nearest multiple and nothing of its border
    is lost.
    """
    labelled = _labelled(images, model.n_classes, image_labels)
    maps = _summed_maps(
        model, images, labelled, scales, flip, tokens, attention_steps, attention_blocks, attention_kind
    )
    return CAMs(*(_placed(one, labelled, len(images), model.n_classes) for one in maps))


@torch.no_grad()
def labelled_cams(
    model: ToCo,
    images: Float[Tensor, "B 3 H W"],
    image_labels: Num[Tensor, "B K"],
    *,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
    tokens: Tokens | None = None,
    attention_steps: int = 0,
    attention_blocks: Sequence[int] = (),
    attention_kind: str = "attention",
) -> LabelledCAMs:
    """`multi_scale_cam` of the labelled classes, without the maps of 0 that the others would take."""
    image, k = labelled = _labelled(images, model.n_classes, image_labels)
    present = image_labels > 0
    filled = present.sum(1)
    n_slots = int(filled.max()) if len(filled) else 0
    slot = (present.cumsum(1) - 1)[present].to(images.device, non_blocking=True)
    maps = _summed_maps(
        model, images, labelled, scales, flip, tokens, attention_steps, attention_blocks, attention_kind
    )
    classes = k.new_zeros(len(images), n_slots)
    classes[image, slot] = k
    cams = CAMs(*(_placed(one, (image, slot), len(images), n_slots) for one in maps))
    return LabelledCAMs(cams, classes, torch.arange(n_slots, device=filled.device) < filled[:, None])


def on_all_classes(labelled: LabelledCAMs, n_classes: int) -> CAMs:
    """The same with a map for every class, 0 for those that an image does not have."""
    found = []
    for maps in labelled.cams:
        place = labelled.classes[:, :, None, None].expand_as(maps)
        whole = maps.new_zeros(len(maps), n_classes, *maps.shape[2:])
        found.append(whole.scatter_add_(1, place, maps))  # adds 0 where a slot is not filled
    return CAMs(*found)


def _placed(maps: Tensor, place: tuple[Tensor, Tensor], n_images: int, n_maps: int) -> Tensor:
    """M H W maps at their place among `n_maps` of each image; the others are 0."""
    whole = maps.new_zeros(n_images, n_maps, *maps.shape[1:])
    whole[place] = maps
    return whole


def _summed_maps(
    model, images, labelled, scales, flip, tokens, attention_steps, attention_blocks, attention_kind
) -> tuple[Tensor, Tensor]:
    """Normalised M H W maps of the labelled classes, of the final and of the auxiliary classifier."""
    if not len(scales) or min(scales) <= 0:
        raise ToCoError(f"scales = {scales!r} is not allowed: one or more positive numbers")
    size = images.shape[-2:]
    if not len(labelled[0]):
        return images.new_zeros(0, *size), images.new_zeros(0, *size)
    attend = tuple(attention_blocks) if attention_steps else ()
    if tokens is not None and attend and tokens.attention is None:
        tokens = None
    total: Any = 0
    aux_total: Any = 0
    for scale in scales:
        views = scaled(model, images, scale)
        if scale == 1 and tokens is not None:
            parts = [(tokens, False)] + ([(model.encode(views.flip(-1), attend=attend), True)] if flip else [])
        elif flip:
            both = model.encode(torch.cat([views, views.flip(-1)]), attend=attend)
            parts = [(_half(both, 0), False), (_half(both, 1), True)]
        else:
            parts = [(model.encode(views, attend=attend), False)]
        affinities = [
            token_affinity(t.attention, attention_kind) if attend and t.attention is not None else None
            for t, _ in parts
        ]
        pairs = [
            _maps(model, *part, labelled, size, affinity=affinity, steps=attention_steps)
            for part, affinity in zip(parts, affinities, strict=True)
        ]
        cams, aux_cams = zip(*pairs, strict=True)
        total = total + torch.stack(cams).amax(0).relu_()
        aux_total = aux_total + torch.stack(aux_cams).amax(0).relu_()
    return normalise_cam(total), normalise_cam(aux_total)


def _labelled(images: Tensor, n_classes: int, image_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Image and class numbers of the M maps that are wanted."""
    if image_labels is None:
        image_labels = torch.ones(len(images), n_classes)
    image, k = (index.to(images.device, non_blocking=True) for index in torch.nonzero(image_labels, as_tuple=True))
    return image, k


def scaled(model: ToCo, images: Tensor, scale: float) -> Tensor:
    """The images resized bilinearly; to whole patches, so that no border is lost, unless `model.dropped_border`."""
    if scale == 1:
        return images
    height, width = int(scale * images.shape[-2]), int(scale * images.shape[-1])
    if model.dropped_border and (height < model.patch_size[0] or width < model.patch_size[1]):
        size = f"{images.shape[-2]} x {images.shape[-1]}"
        raise ToCoError(f"scale = {scale} of an image of {size} leaves less than a patch: a larger one is needed")
    if not model.dropped_border:
        height, width = model.fitted_size(height, width)
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def _half(tokens: Tokens, which: int) -> Tokens:
    """The first or the second half of a batch."""

    def half(part: Tensor) -> Tensor:
        return part.chunk(2)[which]

    attention = None if tokens.attention is None else half(tokens.attention)
    return Tokens(*map(half, tokens[:3]), tokens.grid, attention)


def _maps(model: ToCo, tokens: Tokens, mirrored: bool, labelled, size, *, affinity, steps: int) -> list[Tensor]:
    """M H W maps of the labelled classes, of the final and of the auxiliary classifier. A mirrored one is turned back
    at image size: at token size rounding would differ from the release."""
    found = []
    for patch_map, head in ((tokens.patch_map, model.classifier), (tokens.aux_patch_map, model.aux_classifier)):
        with torch.autocast(patch_map.device.type, enabled=False):
            cam = class_activation(patch_map.to(head.weight.dtype), head.weight)
            if steps:
                cam = carried(cam, affinity, steps).to(cam.dtype)
            cam = cam[labelled]
        cam = F.interpolate(cam[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
        found.append(cam.flip(-1) if mirrored else cam)
    return found
