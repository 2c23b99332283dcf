"""Local views for class token contrast: where they are cut, and which of them show an object.

Crops are centred on background and uncertain places (region mask 0 and 1; the places that CAM is sure of teach nothing
new), half a crop away from the border. A crop with little activation is negative, the others are positive: their class
tokens are pushed from, or pulled to, the whole image's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .conventions import UNCERTAIN
from .errors import ToCoError
from .labels import inside_box
from .machine.device import widest_float


class CropBoxes(NamedTuple):
    """Top left corners of the crops of each image, in pixels."""

    top: Int[Tensor, "B V"]
    left: Int[Tensor, "B V"]


def sample_crops(
    region_mask: Int[Tensor, "B H W"],
    *,
    n_crops: int,
    crop_size: int,
    generator: torch.Generator | None = None,
    valid_box: Int[Tensor, "B 4"] | None = None,
    crops_in_padding: bool = False,
) -> CropBoxes:
    """`n_crops` different crops per image, centred with equal chance on any background or uncertain pixel.

    Crops lie in the image as a whole, so centres are half a crop away from its border. With fewer than `n_crops` such
    pixels they may be anywhere (a crop may repeat where even that leaves fewer). `valid_box` (top, bottom, left, right
    of the real image) excludes centres in the padding, also when they may be anywhere, unless it holds no place at all.
    The release draws from the padding too; a black view says nothing about an image, so that we do it only with
    `crops_in_padding`.

    `generator` lives on the CPU: the same seed draws the same crops on every device. Raises ToCoError for a crop larger
    than the image.
    """
    height, width = region_mask.shape[1:]
    if not 1 <= crop_size <= min(height, width):
        raise ToCoError(f"crop_size = {crop_size}: 1 to the image's shorter side, {min(height, width)}, is allowed")
    if n_crops < 0:
        raise ToCoError(f"n_crops = {n_crops}: 0 or more are allowed")
    half = crop_size // 2
    rows, columns = height - crop_size + 1, width - crop_size + 1

    wanted = region_mask[:, half : half + rows, half : half + columns] <= UNCERTAIN
    anywhere = torch.ones_like(wanted)
    if valid_box is not None and not crops_in_padding:
        real = inside_box(valid_box - half, (rows, columns))
        anywhere = real | (_count(real) == 0)
        wanted &= anywhere
    wanted = torch.where(_count(wanted) < n_crops, anywhere, wanted)

    position = _draw(wanted.flatten(1), n_crops, generator)
    return CropBoxes(top=position // columns, left=position % columns)


def foreground_ratio(
    region_mask: Int[Tensor, "B H W"],
    top: Int[Tensor, "B V"],
    left: Int[Tensor, "B V"],
    crop_size: int,
    *,
    foreground_counts_double: bool = True,
) -> Float[Tensor, "B V"]:
    """Mean of the region values (0, 1, 2) in each crop, in [0, 2]; their sum is exact.

    A foreground pixel so counts twice as much as an uncertain one. That is how the release does it, and its threshold
    of 0.2 was chosen for it; without `foreground_counts_double` it is the share of the two, in [0, 1]. Raises ToCoError
    for a crop that leaves the image.
    """
    values = region_mask if foreground_counts_double else region_mask.clamp(max=1)
    return _windows(values, top, left, crop_size).sum((-2, -1)).float() / crop_size**2


def crop_flags(
    region_mask: Int[Tensor, "B H W"],
    top: Int[Tensor, "B V"],
    left: Int[Tensor, "B V"],
    crop_size: int,
    *,
    threshold: float = 0.2,
    foreground_counts_double: bool = True,
) -> Bool[Tensor, "B V"]:
    """`is_positive`: whether a crop's `foreground_ratio` is above the threshold. At most the threshold is negative."""
    ratio = foreground_ratio(region_mask, top, left, crop_size, foreground_counts_double=foreground_counts_double)
    return ratio > threshold


def cut_crops(
    images: Float[Tensor, "B 3 H W"], top: Int[Tensor, "B V"], left: Int[Tensor, "B V"], crop_size: int
) -> Float[Tensor, "B V 3 s s"]:
    """The crops, pixel for pixel. Raises ToCoError for a crop that leaves the image."""
    return _windows(images, top, left, crop_size)


def local_views(
    images: Float[Tensor, "B 3 H W"], boxes: CropBoxes, crop_size: int, *, resized: bool = False
) -> Float[Tensor, "B V 3 s t"]:
    """The crops as the encoder sees them: pixel for pixel, or `resized` (bilinearly) to the images' height and width.

    The latter is not the paper's: it takes from the encoder the size, by which a crop is told from a whole image
    whatever it shows. Raises ToCoError for a crop that leaves the image.
    """
    views = cut_crops(images, *boxes, crop_size)
    if not resized:
        return views
    large = F.interpolate(views.flatten(0, 1), size=images.shape[-2:], mode="bilinear", align_corners=False)
    return large.unflatten(0, views.shape[:2])


def _windows(maps: Shaped[Tensor, "B *C H W"], top: Tensor, left: Tensor, size: int) -> Shaped[Tensor, "B V *C s s"]:
    """One gather from a view that holds every possible window."""
    _check_corners(top, left, size, *maps.shape[-2:])
    every = maps.unfold(-2, size, 1).unfold(-2, size, 1)  # B C rows columns s s
    every = every.movedim((-4, -3), (1, 2))  # neighbouring index axes copy whole rows of pixels
    return every[torch.arange(len(maps), device=maps.device)[:, None], top, left]


def _count(maps: Bool[Tensor, "B h w"]) -> Int[Tensor, "B 1 1"]:
    return maps.count_nonzero((1, 2))[:, None, None]


def _draw(allowed: Bool[Tensor, "B M"], n: int, generator: torch.Generator | None) -> Int[Tensor, "B n"]:
    """`n` different allowed positions per row, every set with equal chance; a row that has fewer repeats them."""
    running = allowed.cumsum(1, dtype=torch.int32)
    count = running[:, -1:].to(widest_float(allowed.device))
    # The i-th is drawn among the count - i that are left, then moved past those before it that are taken: the j-th
    # taken, counted from below, is passed by all that are at least taken - j.
    enough = count >= n
    left_over = torch.where(enough, count - torch.arange(n, device=count.device), count)
    chance = torch.rand(len(allowed), n, generator=generator, dtype=torch.float64).to(count.dtype)
    rank = (chance.to(count.device, non_blocking=True) * left_over).long()
    rank = torch.minimum(rank, left_over.long() - 1)  # a chance that float32 rounds to 1
    for i in range(1, n):
        taken = rank[:, :i].sort(dim=1).values - torch.arange(i, device=count.device)
        rank[:, i] += (rank[:, i : i + 1] >= taken).sum(1) * enough[:, 0]
    return torch.searchsorted(running, (rank + 1).to(running))


def _check_corners(top: Tensor, left: Tensor, crop_size: int, height: int, width: int) -> None:
    if top.device.type in ("cuda", "meta"):  # a look would wait for the device, which stops at a wrong index itself
        return
    for name, corner, length in (("top", top, height), ("left", left, width)):
        if corner.numel() and not (0 <= int(corner.min()) and int(corner.max()) + crop_size <= length):
            raise ToCoError(
                f"{name} corners {int(corner.min())} to {int(corner.max())} of {crop_size} pixel crops: "
                f"0 to {length - crop_size} fits the image of {length}"
            )
