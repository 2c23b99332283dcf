"""Masks without classes, of Segment Anything or superpixels, as a refiner: each takes the label that most of it has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toco_core.errors import ToCoError

MOST = 5000  # masks of one image
WANTED = (
    "a list of dictionaries with `segmentation` (Segment Anything, SAM 2, MobileSAM), n masks as n x H x W, or a label "
    "image H x W in which each number is a mask"
)


@dataclass(frozen=True)
class MaskVote:
    """Each mask takes, as a whole, the label with the largest overlap.

    The label of a pixel is the largest of the background and the class probabilities (where they tie the lower one,
    background first). A mask takes the label of most of its pixels, background like any other; where two have as many,
    the lower one. A smaller mask lies on a larger one, and of two of the same size the one that is given first. A pixel
    that no mask has keeps its own label. As labels are made against two background scores, beta_l and beta_h, the masks
    vote twice: where a mask has a class against the lower one only, it is uncertain.

    masks: called with an image, uint8 H W 3 in RGB, for its masks, as `SamAutomaticMaskGenerator.generate`; or the
        masks of each image, in the order of the batch. What masks are is said in `WANTED`. Masks of another size than
        the image are resized to the nearest pixel.
    """

    masks: Callable[[np.ndarray], Any] | Sequence[Any] | None = None
    scale: float = 1.0

    def __call__(
        self, images: Float[Tensor, "B 3 h w"], classes: Sequence[Float[Tensor, "B k h w"]]
    ) -> list[Float[Tensor, "B k1 h w"]]:
        """1 for the label of a pixel after the vote, 0 for the others. Raises ToCoError for what are no masks."""
        if self.masks is None:
            raise ToCoError("refiner = 'masks' needs masks = a function of an image, or the masks of each image")
        if not callable(self.masks) and len(self.masks) != len(images):
            raise ToCoError(f"masks of {len(self.masks)} images are not allowed: {len(images)} images are refined")
        refined: list[list[Tensor]] = [[] for _ in classes]
        for b, image in enumerate(images):
            given = self.masks(_as_bytes(image)) if callable(self.masks) else self.masks[b]
            stack = mask_stack(given, tuple(image.shape[1:]))
            for found, part in zip(refined, classes, strict=True):
                scores = torch.cat([1 - part[b].sum(0, keepdim=True), part[b]])
                label = voted(scores.float().cpu().numpy().argmax(0), stack)
                one_hot = torch.from_numpy(label == np.arange(len(scores))[:, None, None])
                found.append(one_hot.to(part))
        return [torch.stack(found) for found in refined]

    def of(self, images: Sequence[int]) -> "MaskVote":
        """The refiner of some of the images for which this one was built, by their numbers."""
        if self.masks is None or callable(self.masks):
            return self
        return MaskVote([self.masks[number] for number in images], self.scale)


def voted(label: Int[np.ndarray, "h w"], masks: Bool[np.ndarray, "n h w"]) -> Int[np.ndarray, "h w"]:
    """The label after each mask took that of most of its pixels; the rule is in `MaskVote`."""
    result = label.copy()
    sizes = masks.sum((1, 2))
    for n in sorted(range(len(masks)), key=lambda n: (-sizes[n], -n)):  # the last one painted lies on top
        if sizes[n]:
            result[masks[n]] = np.argmax(np.bincount(label[masks[n]]))
    return result


def mask_stack(given: Any, size: tuple[int, int]) -> Bool[np.ndarray, "n h w"]:
    """Masks in any of the known forms (see `WANTED`) at one size. Raises ToCoError for all others."""
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    if isinstance(given, np.ndarray):
        return _resized(_of_array(given), size)
    if isinstance(given, Sequence) and not isinstance(given, str):
        _refuse_too_many(len(given))
        stacks = [_resized(_of_entry(entry)[None], size) for entry in given]
        return np.concatenate(stacks) if stacks else np.zeros((0, *size), bool)
    raise ToCoError(f"masks = {type(given).__name__} is not allowed: {WANTED}")


def _of_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4 and array.shape[1] == 1:  # SAM's predictor: n 1 H W
        array = array[:, 0]
    if array.ndim == 2 and array.dtype.kind in "iu":
        numbers = np.unique(array)
        _refuse_too_many(len(numbers))
        return array == numbers[:, None, None]
    if array.ndim != 3 or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise ToCoError(f"masks = {array.dtype} of {array.shape} is not allowed: {WANTED}")
    _refuse_too_many(len(array))
    return array.astype(bool)


def _of_entry(entry: Any) -> np.ndarray:
    """One mask, H W: an array, or what a mask generator says of it."""
    mask = entry.get("segmentation") if isinstance(entry, Mapping) else entry
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().numpy()
    if isinstance(mask, Mapping):  # COCO's RLE, packed or not, as the generators give it with `output_mode`
        from toco_core.data.layouts.coco import rle_mask  # here: refiners need no data otherwise

        return rle_mask(mask)
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "biuf":
        raise ToCoError(f"a mask is {type(mask).__name__}: {WANTED}")
    if not np.isin(mask, (0, 1)).all():
        raise ToCoError(f"a mask of {mask.shape} holds other values than 0 and 1")
    return mask.astype(bool)


def _resized(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if masks.shape[1:] == size or not len(masks):
        return masks if len(masks) else np.zeros((0, *size), bool)
    if 0 in masks.shape:
        raise ToCoError(f"masks of {masks.shape[1]} x {masks.shape[2]} pixels are not allowed")
    rows, columns = ((np.arange(n) * 2 + 1) * m // (2 * n) for n, m in zip(size, masks.shape[1:], strict=True))
    return masks[:, rows[:, None], columns]


def _as_bytes(image: Float[Tensor, "3 h w"]) -> np.ndarray:
    """The image as mask generators take it."""
    return np.ascontiguousarray((255 * image.permute(1, 2, 0).clamp(0, 1)).round().to(torch.uint8).cpu().numpy())


def _refuse_too_many(n: int) -> None:
    if n > MOST:
        raise ToCoError(f"{n} masks of one image are not allowed: at most {MOST}")


def superpixels(image: np.ndarray, *, spacing: int = 12, smoothing: float = 2.0) -> Int[np.ndarray, "H W"]:
    """Superpixels of OpenCV's watershed (compact cells around a grid): a number from 1 per pixel, for `MaskVote`.

    Floods the image's gradient from markers `spacing` pixels apart.
    """
    grey = cv2.GaussianBlur(image, (0, 0), smoothing)
    markers = np.zeros(image.shape[:2], np.int32)
    rows, columns = (range(min(spacing, n) // 2, n, spacing) for n in image.shape[:2])
    for number, (y, x) in enumerate(((y, x) for y in rows for x in columns), start=1):
        cv2.circle(markers, (x, y), max(1, spacing // 6), (number,), -1)
    # OpenCV makes a line of the outermost pixels, too: here of a frame
    grey = cv2.copyMakeBorder(grey, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    cells = cv2.watershed(grey, cv2.copyMakeBorder(markers, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0))
    return _without_lines(cells[1:-1, 1:-1], image)


def _without_lines(cells: Int[np.ndarray, "H W"], image: np.ndarray) -> Int[np.ndarray, "H W"]:
    """Give each pixel of the lines between cells (-1) to that of its neighbours' cells whose pixel looks most alike."""
    (height, width), colours = cells.shape, np.pad(image.astype(np.float32), ((1, 1), (1, 1), (0, 0)))
    while (cells < 1).any():
        framed, joined, least = np.pad(cells, 1), cells.copy(), np.full(cells.shape, np.inf)
        for dy, dx in np.ndindex(3, 3):
            there = slice(dy, dy + height), slice(dx, dx + width)
            distance = np.where(framed[there] < 1, np.inf, np.square(colours[there] - image).sum(2))
            better = (cells < 1) & (distance < least)
            joined[better], least[better] = framed[there][better], distance[better]
        cells = joined
    return cells
