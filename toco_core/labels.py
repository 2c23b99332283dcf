"""From CAM to labels: two thresholds split an image into background, uncertain and foreground.

With m the largest value of `valid_cam` at a pixel and 0 <= beta_l < beta_h <= 1:

                 m <= beta_l     beta_l < m < beta_h     beta_h <= m
    seed_label   0               255 (ignore)            the class that has m, 1..K
    region_mask  0               1 (uncertain)           2

`token_label` is the seed label at the resolution of the patch tokens, `refined_token_label` the pseudo label there,
`affinity_mask` the pairs of tokens that PTC pulls together and pushes apart, `pseudo_label` the refined label that the
decoder learns from, `eval_label` the one with which a CAM is scored.

Where classes tie, the lower one wins. A value exactly at beta_h counts as foreground in all functions (the release's
region mask does so; no reference value tells about its label). No function is differentiable.

`valid_box` holds top, bottom, left, right (bottom and right exclusive) of the real image inside each padded crop, in
pixels of the CAM.

`image_labels` may stay on the CPU whatever device the CAM is on: they are looked up where they are, and nothing here
waits for another device.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from toco_core.conventions import BACKGROUND, IGNORE

from . import par
from .errors import ToCoError
from .refiners import OfImages, build_refiner

CACHED_PIXELS = 2**15  # refined at once on a CPU


def valid_cam(cam: Float[Tensor, "B K H W"], image_labels: Shaped[Tensor, "B K"]) -> Float[Tensor, "B K H W"]:
    """The CAM with the classes that the image does not have set to 0."""
    return cam * image_labels[:, :, None, None].to(cam)


def seed_label(
    cam: Float[Tensor, "B K H W"],
    image_labels: Shaped[Tensor, "B K"],
    *,
    beta_l: float,
    beta_h: float,
    valid_box: Int[Tensor, "B 4"] | None = None,
) -> Int[Tensor, "B H W"]:
    """0 background, 1..K foreground, 255 between the thresholds and outside `valid_box`. `cam` in [0, 1].

    Raises ToCoError unless 0 <= beta_l < beta_h <= 1.
    """
    _check_thresholds(beta_l, beta_h)
    value, label = _strongest(cam, image_labels)
    label[value < beta_h] = IGNORE
    label[value <= beta_l] = 0
    if valid_box is not None:
        label[~inside_box(valid_box, label.shape[1:])] = IGNORE
    return label


def token_label(
    cam: Float[Tensor, "B K H W"],
    image_labels: Shaped[Tensor, "B K"],
    grid: tuple[int, int],
    *,
    beta_l: float,
    beta_h: float,
    valid_box: Int[Tensor, "B 4"] | None = None,
    pixel_box_on_tokens: bool = False,
) -> Int[Tensor, "B h w"]:
    """The seed label of the CAM resized (bilinearly) to the grid (h, w) of patch tokens.

    A token is inside `valid_box` where its centre is. The release applies the box, which is in pixels, to the grid as
    it is, so that an image with more padding at its top or left than the grid has tokens is ignored entirely;
    `pixel_box_on_tokens` does the same.
    """
    classes, present = _labelled_classes(image_labels)
    (classes,) = _on(cam.device, classes)  # `present` stays where the labels are: seed_label will look at it
    resized = _resize(_take(cam, classes), tuple(grid))
    slot = seed_label(resized, present, beta_l=beta_l, beta_h=beta_h)
    label = slot_to_class(slot, classes)
    if valid_box is not None:
        box_size = grid if pixel_box_on_tokens else cam.shape[2:]
        label[~inside_box(valid_box, grid, box_size=box_size)] = IGNORE
    return label


def refined_token_label(
    images: Float[Tensor, "B 3 H W"],
    cam: Float[Tensor, "B K H W"],
    image_labels: Shaped[Tensor, "B K"],
    grid: tuple[int, int],
    **options: Any,
) -> Int[Tensor, "B h w"]:
    """The pseudo label at the grid (h, w) of patch tokens: what at least half of a token's pixels show, else 255.

    `options` as in `pseudo_label`. Of two labels that have half each the lower one wins.
    """
    classes, present = _labelled_classes(image_labels)
    (classes,) = _on(cam.device, classes)
    label = slot_to_class(pseudo_label(images, _take(cam, classes), present, **options), classes)
    return label_at_tokens(label, classes, grid)


def label_at_tokens(
    label: Int[Tensor, "B H W"], classes: Int[Tensor, "B k"], grid: tuple[int, int]
) -> Int[Tensor, "B h w"]:
    """A label at the grid (h, w) of patch tokens: what at least half of a token's pixels show, 0 background or one of
    the image's `classes` 0..K-1 as label 1..K, else 255. Of two that have half each the lower one wins."""
    possible = F.pad(classes + 1, (1, 0))
    shares = [F.adaptive_avg_pool2d((label == one[:, None, None]).float(), grid) for one in possible.T]
    share, slot = torch.stack(shares).max(0)
    return slot_to_class(slot.masked_fill(share < 0.5, IGNORE), classes)


def eval_label(
    cam: Float[Tensor, "B K H W"], image_labels: Shaped[Tensor, "B K"], *, beta: float
) -> Int[Tensor, "B H W"]:
    """What a CAM is scored with: 0 where the largest value is at most `beta`, otherwise its class; nothing ignored."""
    if not 0 <= beta <= 1:
        raise ToCoError(f"beta = {beta}: 0 to 1 is allowed")
    value, label = _strongest(cam, image_labels)
    label[value <= beta] = 0
    return label


def region_mask(
    cam: Float[Tensor, "B K H W"],
    image_labels: Shaped[Tensor, "B K"],
    *,
    beta_l: float,
    beta_h: float,
    valid_box: Int[Tensor, "B 4"] | None = None,
) -> Int[Tensor, "B H W"]:
    """0 background, 1 uncertain, 2 foreground: where local views are drawn, and whether they count as positive.

    With `valid_box` padding is background. The release does not look at the box here: leave it out to do the same.
    """
    _check_thresholds(beta_l, beta_h)
    labelled = _on(cam.device, *_labelled_classes(image_labels))
    value = functools.reduce(torch.maximum, _labelled_maps(cam, *labelled))
    region = (value > beta_l).to(torch.int8) + (value >= beta_h).to(torch.int8)
    if valid_box is not None:
        region[~inside_box(valid_box, region.shape[1:])] = BACKGROUND
    return region


def pseudo_label(
    images: Float[Tensor, "B 3 H W"],
    cam: Float[Tensor, "B K H W"],
    image_labels: Shaped[Tensor, "B K"],
    *,
    beta_l: float,
    beta_h: float,
    valid_box: Int[Tensor, "B 4"] | None = None,
    refiner: str = "par",
    **settings: Any,
) -> Int[Tensor, "B H W"]:
    """The label after refinement: 0 background, 1..K, 255 uncertain or outside `valid_box`. `images` in [0, 1].

    Refined against the background score beta_h (see `refined_labels`), what is not background is foreground; against
    beta_l, what is background also against beta_h is background; the rest is uncertain.

    The release rounds the images down to whole grey levels first; do so outside to agree with it in every pixel.
    Raises ToCoError unless 0 <= beta_l < beta_h <= 1 and 0 < scale <= 1.
    """
    _check_thresholds(beta_l, beta_h)
    high, low = refined_labels(images, cam, image_labels, betas=(beta_h, beta_l), refiner=refiner, **settings)
    label = with_uncertain(low=low, high=high)
    if valid_box is not None:
        label[~inside_box(valid_box, label.shape[1:])] = IGNORE
    return label


def refined_labels(
    images: Float[Tensor, "B 3 H W"],
    cam: Float[Tensor, "B K H W"],
    image_labels: Shaped[Tensor, "B K"],
    *,
    betas: Sequence[float],
    refiner: str = "par",
    **settings: Any,
) -> Int[Tensor, "T B H W"]:
    """For each of T background scores the label after refinement, 0 background or 1..K; nothing is uncertain yet.

    The labelled classes' CAMs and a constant background score become probabilities (softmax) and are refined at `scale`
    times the image's size. `refiner` is a name in `refiners.REFINERS`, `settings` are fields of its record (for "par":
    `iterations`, `dilations`, `scale`). Raises ToCoError for an unknown refiner and unless 0 < scale <= 1.
    """
    refine = build_refiner(refiner, **settings)
    if not 0 < refine.scale <= 1:
        raise ToCoError(f"scale = {refine.scale} of {refiner}: above 0 and at most 1 is allowed")
    size = tuple(images.shape[2:])
    small = tuple(max(1, math.floor(length * refine.scale)) for length in size)
    label = torch.zeros(len(betas), len(images), *size, dtype=torch.long, device=cam.device)

    for part in _refined_together(image_labels, small[0] * small[1], cam.device):
        classes, present = _labelled_classes(image_labels[part])
        if not classes.shape[1] or not len(betas):
            continue
        classes, present = _on(cam.device, classes, present)
        strength = _resize(_take(cam[part], classes), small).exp() * present[:, :, None, None]
        against = [strength / (math.exp(beta) + strength.sum(1, keepdim=True)) for beta in betas]
        numbers = range(len(images))[part] if isinstance(part, slice) else part.tolist()
        refine_part = refine.of(numbers) if isinstance(refine, OfImages) else refine
        with torch.no_grad():
            refined = refine_part(_resize(images[part], small), against)
        for t, scores in enumerate(refined):
            label[t, part] = _slot_to_class(upsampled_argmax(scores, size), classes)
    return label


def with_uncertain(*, low: Int[Tensor, "*B H W"], high: Int[Tensor, "*B H W"]) -> Int[Tensor, "*B H W"]:
    """One label of two: the class where the strict one (`high`, against beta_h) has a class, 255 where only the lenient
    one (`low`, against beta_l) has one, 0 where neither has."""
    return torch.where((high == 0) & (low != 0), IGNORE, high)


def affinity_mask(label: Int[Tensor, "B h w"]) -> Int[Tensor, "B N N"]:
    """Pairs of tokens: 1 same label (background included), 0 different, 255 if one is ignored and on the diagonal."""
    label = label.flatten(1)
    mask = (label[:, :, None] == label[:, None, :]).to(torch.int16)
    ignored = label == IGNORE
    mask.masked_fill_(ignored[:, :, None] | ignored[:, None, :], IGNORE)
    mask.diagonal(dim1=1, dim2=2).fill_(IGNORE)
    return mask


def inside_box(
    valid_box: Int[Tensor, "B 4"], grid: Sequence[int], *, box_size: Sequence[int] | None = None
) -> Bool[Tensor, "B h w"]:
    """True where the centre of a cell of the grid lies in the box.

    `box_size` (H, W) is the size that the box is measured in, by default the grid's own.
    """
    (h, w), (box_h, box_w) = grid, box_size or grid
    y = (torch.arange(h, device=valid_box.device) + 0.5) * (box_h / h)
    x = (torch.arange(w, device=valid_box.device) + 0.5) * (box_w / w)
    top, bottom, left, right = valid_box[:, :, None].unbind(1)
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


def upsampled_argmax(scores: Float[Tensor, "B C h w"], size: Sequence[int]) -> Int[Tensor, "B H W"]:
    """argmax over C of the scores resized bilinearly to `size` (H, W), without holding all of them at that size."""
    scores = scores.detach()
    return _running_argmax(_resize(scores[:, c : c + 1], size)[:, 0] for c in range(scores.shape[1]))[1]


def merged_logits(maps: Sequence[Tensor], size: Sequence[int], *, max_over_scales: bool = True) -> Tensor:
    """B C H W logits at `size` from one or more B C h w: per class the maximum over scales, as published, or the mean.

    Float32, or float64 where the maps are.
    """
    exact = (m if m.dtype == torch.float64 else m.float() for m in maps)
    resized = (F.interpolate(m, size=tuple(size), mode="bilinear", align_corners=False) for m in exact)
    return functools.reduce(torch.maximum, resized) if max_over_scales else torch.stack([*resized]).mean(0)


def merged_argmax(maps: Sequence[Tensor], size: Sequence[int], *, max_over_scales: bool = True) -> Int[Tensor, "B H W"]:
    """argmax over C of `merged_logits`, without holding all of them at that size."""
    classes = range(maps[0].shape[1])
    merged = (merged_logits([m[:, c : c + 1] for m in maps], size, max_over_scales=max_over_scales) for c in classes)
    return _running_argmax(m[:, 0] for m in merged)[1]


def _running_argmax(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest value and the first index that has it, map by map: no argmax over a strided axis."""
    rest = iter(maps)
    value = next(rest)
    index = torch.zeros_like(value, dtype=torch.long)
    for i, candidate in enumerate(rest, 1):
        index.masked_fill_(candidate > value, i)
        value = torch.maximum(value, candidate)
    return value, index


def _strongest(cam: Tensor, image_labels: Tensor) -> tuple[Float[Tensor, "B H W"], Int[Tensor, "B H W"]]:
    """Largest value of `valid_cam` per pixel and its class in 1..K (0 where no labelled class is above 0)."""
    classes, present = _on(cam.device, *_labelled_classes(image_labels))
    value, slot = _running_argmax(_labelled_maps(cam, classes, present))
    return value, _slot_to_class(slot, classes)


def _labelled_maps(cam: Tensor, classes: Tensor, present: Tensor) -> Iterator[Float[Tensor, "B H W"]]:
    """Zeros, which the classes that an image lacks have in `valid_cam`; then each image's first class, its second..."""
    cam = cam.detach()
    yield cam.new_zeros(len(cam), *cam.shape[2:], dtype=par.full_precision(cam[:0]).dtype)
    batch = torch.arange(len(cam), device=cam.device)
    for c, p in zip(classes.T, present.T, strict=True):
        yield par.full_precision(cam[batch, c]) * p[:, None, None]


def _refined_together(image_labels: Tensor, pixels: int, device: torch.device) -> list[slice] | list[Tensor]:
    """Which images are refined at once. On a GPU all; on a CPU those with equally many classes, so that none is refined
    for a class that only another has, and as many as stay in its caches."""
    if device.type != "cpu":
        return [slice(None)]
    n_classes = (image_labels > 0).sum(1)
    return [
        part
        for n in n_classes.unique()
        for part in torch.nonzero(n_classes == n)[:, 0].split(max(1, CACHED_PIXELS // pixels))
    ]


def _labelled_classes(image_labels: Tensor) -> tuple[Int[Tensor, "B k"], Bool[Tensor, "B k"]]:
    """The classes 0..K-1 that each image has, ascending, and which of the k slots are used (k: most of any image)."""
    present = image_labels > 0
    k = int(present.sum(1).max()) if len(present) else 0
    classes = present.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :k]
    return classes, present.gather(1, classes)


def _on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on a device, without waiting for it."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def slot_to_class(slot: Int[Tensor, "B H W"], classes: Int[Tensor, "B k"]) -> Int[Tensor, "B H W"]:
    """0 is background, i + 1 the class classes[:, i] as label 1..K, 255 stays."""
    return torch.where(slot == IGNORE, IGNORE, _slot_to_class(slot.where(slot != IGNORE, 0), classes))


def _slot_to_class(slot: Int[Tensor, "B H W"], classes: Int[Tensor, "B k"]) -> Int[Tensor, "B H W"]:
    """Slot 0 is background, slot i+1 the class classes[:, i] as label 1..K."""
    table = F.pad(classes + 1, (1, 0))
    return table.gather(1, slot.flatten(1)).view_as(slot)


def _take(cam: Tensor, classes: Int[Tensor, "B k"]) -> Tensor:
    """cam[b, classes[b]]."""
    return cam.detach()[torch.arange(len(cam), device=cam.device)[:, None], classes]


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    maps = par.full_precision(maps)
    if not maps.shape[1]:  # no class at all: nothing that torch would resize
        return maps.new_zeros(*maps.shape[:2], *size)
    return maps if maps.shape[2:] == size else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _check_thresholds(beta_l: float, beta_h: float) -> None:
    if not 0 <= beta_l < beta_h <= 1:
        raise ToCoError(f"beta_l = {beta_l}, beta_h = {beta_h}: 0 <= beta_l < beta_h <= 1 is required")
