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
from .refiners.attention import carried, walk

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


def fused(
    activation: Float[Tensor, "B K h w"], class_attention: Float[Tensor, "B K N"], power: float = 1.0
) -> Float[Tensor, "B K h w"]:
    """Class activations at the tokens times where the class's token looks (MCTformer's fusion of its two maps).

    With A the attention of the class tokens to the patches (`Tokens.class_attention`, N = h * w), brought to [0, 1)
    class by class: M_k <- M_k ((A_k - min A_k) / (max A_k - min A_k))^power. A place counts where both maps name it.
    Attention is high in few places, and a `power` below 1, which MCTformer does not have, evens it out.
    """
    attention = class_attention * class_attention.shape[-1]  # around 1: EPSILON is small beside it
    looks = normalise_cam(attention.flatten(0, 1).unflatten(1, activation.shape[2:]))
    return activation * looks.pow(power).view_as(activation).to(activation.dtype)


class CAMViews(NamedTuple):
    """In which views of the (normalised) images CAMs are made, how they are carried along attention, and whether they
    are `fused` with that of the class tokens."""

    scales: Sequence[float] = (1.0, 0.5, 1.5)
    """Each contributes relu(max(map, map of the mirrored image)) after bilinear resizing to H x W."""
    flip: bool = True
    """Without it the mirrored image is left out."""
    attention_steps: int = 0
    """Carry the activations of every view so often along its own attention, at the tokens, before they are resized (see
    `refiners.attention`, also for the kind)."""
    attention_blocks: Sequence[int] = ()
    attention_kind: str = "attention"
    class_attention: float = 0.0
    """Multiply the activations of every view by this power of its class tokens' attention, at the tokens, before they
    are carried; 0: not."""

    def attended(self) -> tuple[int, ...]:
        """The blocks whose attention a pass must keep."""
        return tuple(self.attention_blocks) if self.attention_steps else ()


@torch.no_grad()
def multi_scale_cam(
    model: ToCo,
    images: Float[Tensor, "B 3 H W"],
    *,
    tokens: Tokens | None = None,
    image_labels: Num[Tensor, "B K"] | None = None,
    **views: Any,
) -> CAMs:
    """CAM and auxiliary CAM, summed over views of the (normalised) images, the sum normalised per image and class.

    tokens: `model.encode(images)` where it is at hand; it serves as the unflipped scale 1, so that pass is not
    repeated. Where CAMs are carried along attention it should come from `model.encode(images,
    attend=attention_blocks)`, where they are fused from `model.encode(images, classes=True)`; otherwise that pass is
    repeated.
    image_labels: B K in {0, 1}. Only maps of labelled classes are made; the others are 0, which is what
    `labels.valid_cam` would make of them. Without it, all K. Which classes those are is looked up where the labels
    are: for labels on the CPU no device is waited for.
    views: fields of `CAMViews`.

    No gradient, no decoder. Without attention steps it equals the release (which always includes scale 1) when
    `model.dropped_border`, to 3e-6 with fused attention and to 3e-7 within `model.plain_attention()`; otherwise a
    scaled image whose size is not a multiple of the patch is fitted to the nearest multiple and nothing of its border
    is lost.
    """
    if image_labels is None:
        image_labels = torch.ones(len(images), model.n_classes)
    return on_all_classes(labelled_cams(model, images, image_labels, tokens=tokens, **views), model.n_classes)


@torch.no_grad()
def labelled_cams(
    model: ToCo,
    images: Float[Tensor, "B 3 H W"],
    image_labels: Num[Tensor, "B K"],
    *,
    tokens: Tokens | None = None,
    **views: Any,
) -> LabelledCAMs:
    """`multi_scale_cam` of the labelled classes, without the maps of 0 that the others would take."""
    present = image_labels > 0
    filled = present.sum(1)
    n_slots = int(filled.max()) if len(filled) else 0
    places = *torch.nonzero(present, as_tuple=True), (present.cumsum(1) - 1)[present]
    image, k, slot = (place.to(images.device, non_blocking=True) for place in places)
    classes = k.new_zeros(len(images), n_slots)
    classes[image, slot] = k
    cams = []
    for maps in _summed_maps(model, images, (image, k), tokens, CAMViews(**views)):
        cams.append(maps.new_zeros(len(images), n_slots, *maps.shape[1:]))
        cams[-1][image, slot] = maps
    return LabelledCAMs(CAMs(*cams), classes, torch.arange(n_slots, device=filled.device) < filled[:, None])


def on_all_classes(labelled: LabelledCAMs, n_classes: int) -> CAMs:
    """The same with a map for every class, 0 for those that an image does not have."""
    found = []
    for maps in labelled.cams:
        place = labelled.classes[:, :, None, None].expand_as(maps)
        whole = maps.new_zeros(len(maps), n_classes, *maps.shape[2:])
        found.append(whole.scatter_add_(1, place, maps))  # adds 0 where a slot is not filled
    return CAMs(*found)


def _summed_maps(
    model: ToCo, images: Tensor, labelled: tuple[Tensor, Tensor], tokens: Tokens | None, views: CAMViews
) -> list[Tensor]:
    """Normalised M H W maps of the labelled classes, of the final and of the auxiliary classifier."""
    if not len(views.scales) or min(views.scales) <= 0:
        raise ToCoError(f"scales = {views.scales!r} is not allowed: one or more positive numbers")
    if views.attention_steps and not views.attention_blocks:
        raise ToCoError(
            "attention_blocks = () is not allowed: one or more blocks along whose attention CAMs are carried"
        )
    if not len(labelled[0]):
        return [images.new_zeros(0, *images.shape[-2:])] * 2
    options: dict[str, Any] = {"attend": views.attended(), "classes": views.class_attention > 0}
    if tokens is not None and (
        (views.attended() and tokens.attention is None) or (views.class_attention and tokens.class_attention is None)
    ):
        tokens = None
    totals: list[Any] = [0, 0]
    for scale in views.scales:
        straight = scaled(model, images, scale)
        if scale == 1 and tokens is not None:
            parts = [tokens] + ([model.encode(straight.flip(-1), **options)] if views.flip else [])
        elif views.flip:
            both = model.encode(torch.cat([straight, straight.flip(-1)]), **options)
            parts = [both.part(slice(len(images))), both.part(slice(len(images), None))]
        else:
            parts = [model.encode(straight, **options)]
        maps = [_maps(model, one, bool(n), labelled, images.shape[-2:], views) for n, one in enumerate(parts)]
        totals = [
            total + torch.stack(of_head).amax(0).relu_()
            for total, of_head in zip(totals, zip(*maps, strict=True), strict=True)
        ]
    return [normalise_cam(total) for total in totals]


def scaled(model: ToCo, images: Tensor, scale: float) -> Tensor:
    """The images resized bilinearly; to whole patches, so that no border is lost, unless `model.dropped_border`."""
    if scale == 1:
        return images
    if not scale > 0:
        raise ToCoError(f"scale = {scale} is not allowed: positive numbers")
    height, width = int(scale * images.shape[-2]), int(scale * images.shape[-1])
    if model.dropped_border and (height < model.patch_size[0] or width < model.patch_size[1]):
        size = f"{images.shape[-2]} x {images.shape[-1]}"
        raise ToCoError(f"scale = {scale} of an image of {size} leaves less than a patch: a larger one is needed")
    if not model.dropped_border:
        height, width = model.fitted_size(height, width)
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def _maps(model: ToCo, tokens: Tokens, mirrored: bool, labelled, size, views: CAMViews) -> list[Tensor]:
    """M H W maps of the labelled classes, of the final and of the auxiliary classifier. A mirrored one is turned back
    at image size: at token size rounding would differ from the release."""
    found, affinity = [], None
    if views.attention_steps and tokens.attention is not None:
        affinity = walk(tokens, views.attention_kind)
    for patch_map, head in ((tokens.patch_map, model.classifier), (tokens.aux_patch_map, model.aux_classifier)):
        with torch.autocast(patch_map.device.type, enabled=False):
            cam = class_activation(patch_map.to(head.weight.dtype), head.weight)
            if views.class_attention and tokens.class_attention is not None:
                cam = fused(cam, tokens.class_attention, views.class_attention)
            if affinity is not None:
                cam = carried(cam, affinity, views.attention_steps).to(cam.dtype)
            cam = cam[labelled]
        cam = F.interpolate(cam[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
        found.append(cam.flip(-1) if mirrored else cam)
    return found
