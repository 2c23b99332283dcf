"""PAR, pixel-adaptive refinement: scores flow between neighbouring pixels of similar colour.

ToCo refines its pseudo labels with it; it was introduced by AFA ("Learning Affinity from Attention", CVPR 2022).

Every pixel i looks at the 8 neighbours j at each of several distances (the dilations). With I the image, s_i the
standard deviation of a colour channel over those neighbours, |P_i - P_j| the distance in pixels and s_P its standard
deviation over the neighbours,

    k_rgb(i, j) = -mean over channels of (|I_i - I_j| / (w1 s_i))^2         w1 = 0.3   (COLOUR_WIDTH)
    k_pos(i, j) = -(|P_i - P_j| / (w2 s_P))^2                               w2 = 0.3   (POSITION_WIDTH)
    a(i, j)     = softmax_j k_rgb + w3 softmax_j k_pos                      w3 = 0.01  (POSITION_WEIGHT)
    M_i        <- sum_j a(i, j) M_j                                         repeated

The pixel itself is not among its neighbours, and the image is continued beyond its border by its border pixels. The
weights of a pixel sum to 1.01: masks grow by 1.01 per iteration, and only their order within a pixel is used. The
affinity depends on the image alone:

    weights = affinity(images)             # once per image, about half of the work
    refined = apply(weights, masks)        # as often as there are masks
    refined = refine(images, masks)        # both

Nothing here is differentiable: refined masks become labels.
"""

import functools
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .errors import ToCoError

ITERATIONS = 10
DILATIONS = (1, 2, 4, 8, 12, 24)
COLOUR_WIDTH = 0.3
POSITION_WIDTH = 0.3
POSITION_WEIGHT = 0.01
STD_EPS = 1e-8  # added to standard deviations: where all neighbours are equal, all get the same weight


class Affinity(NamedTuple):
    """How much each pixel takes from its neighbours: weights[o, b, y, x] from the one at (y, x) + offsets[o]."""

    weights: Float[Tensor, "O B H W"]  # sums to 1.01 over o
    offsets: tuple[tuple[int, int], ...]  # (dy, dx)


def affinity(images: Float[Tensor, "B 3 H W"], *, dilations: tuple[int, ...] = DILATIONS) -> Affinity:
    """The weights a(i, j) of the module's equation, float32 (float64 for float64 images), also under autocast.

    `images` may have any range: colours count relative to their standard deviation (up to `STD_EPS`).
    Raises ToCoError for dilations that are not positive whole numbers.
    """
    offsets = neighbour_offsets(dilations)
    with torch.no_grad():
        images = full_precision(images)
        if kernels := gpu_kernels(images):
            given = _on_device(offsets, images.device)
            return Affinity(kernels.affinity(images, *given, COLOUR_WIDTH, STD_EPS), offsets)
        neighbours = _Neighbours(images, offsets)
        # Two passes: in one (mean of squares minus square of mean) nothing would be left of a small deviation.
        mean = sum(neighbours) / len(offsets)
        deviation = torch.zeros_like(images)
        for neighbour in neighbours:
            difference = neighbour - mean
            deviation.addcmul_(difference, difference)
        deviation = deviation.div_(len(offsets) - 1).sqrt_()

        inverse_width = 1 / (COLOUR_WIDTH * (deviation + STD_EPS))
        weights = images.new_empty(len(offsets), images.shape[0], *images.shape[2:])
        for weight, neighbour in zip(weights, neighbours, strict=True):
            torch.mean(((neighbour - images) * inverse_width).square_(), dim=1, out=weight)
        weights = weights.neg_().softmax(dim=0)
        weights += _position_weights(offsets, images)[:, None, None, None]
    return Affinity(weights, offsets)


def apply(
    affinity: Affinity, masks: Float[Tensor, "B C h w"], *, iterations: int = ITERATIONS
) -> Float[Tensor, "B C H W"]:
    """`iterations` rounds of M_i <- sum_j a(i, j) M_j.

    Masks of another size than the affinity's images are resized first, bilinearly with aligned corners as in the
    release. Zero iterations only resize. Raises ToCoError for a negative number.
    """
    if iterations < 0:
        raise ToCoError(f"iterations = {iterations} of PAR: 0 or more are allowed")
    weights, offsets = affinity
    with torch.no_grad():
        masks = full_precision(masks)
        if masks.shape[2:] != weights.shape[2:]:
            masks = F.interpolate(masks, size=weights.shape[2:], mode="bilinear", align_corners=True)
        if kernels := gpu_kernels(weights):
            return kernels.rounds(weights, masks, _on_device(offsets, weights.device)[0], iterations)
        for _ in range(iterations):
            masks = _round(weights, masks, offsets)
    return masks


def _round(weights: Tensor, masks: Tensor, offsets: tuple[tuple[int, int], ...]) -> Tensor:
    neighbours = _Neighbours(masks, offsets)
    total = torch.zeros_like(masks)
    for weight, neighbour in zip(weights, neighbours, strict=True):
        total.addcmul_(weight[:, None], neighbour)
    return total


def refine(
    images: Float[Tensor, "B 3 H W"],
    masks: Float[Tensor, "B C h w"],
    *,
    iterations: int = ITERATIONS,
    dilations: tuple[int, ...] = DILATIONS,
) -> Float[Tensor, "B C H W"]:
    """PAR of `masks` along the edges of `images`: `apply` after `affinity`."""
    return apply(affinity(images, dilations=dilations), masks, iterations=iterations)


def neighbour_offsets(dilations: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(dy, dx) of the 8 neighbours at each distance."""
    if not dilations or any(int(d) != d or d < 1 for d in dilations):
        raise ToCoError(f"dilations = {dilations!r} of PAR: one or more positive whole numbers are allowed")
    return tuple((y * int(d), x * int(d)) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x)


def full_precision(values: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32: half precision changes 7 % of the refined labels."""
    return values if values.dtype == torch.float64 else values.float()


class _Neighbours:
    """Iterates over `values` shifted by each offset: views into one copy that is padded once."""

    def __init__(self, values: Tensor, offsets: tuple[tuple[int, int], ...]):
        self.height, self.width = values.shape[2:]
        self.reach = max(max(abs(y), abs(x)) for y, x in offsets)
        self.padded = F.pad(values, (self.reach,) * 4, mode="replicate")
        self.offsets = offsets

    def __iter__(self):
        for dy, dx in self.offsets:
            top, left = self.reach + dy, self.reach + dx
            yield self.padded[:, :, top : top + self.height, left : left + self.width]


def _position_weights(offsets: tuple[tuple[int, int], ...], like: Tensor) -> Float[Tensor, " O"]:
    """w3 times the softmax over the neighbours of k_pos: the same at every pixel."""
    distance = torch.tensor(offsets, dtype=torch.float64).norm(dim=1)
    kernel = -(distance / (POSITION_WIDTH * (distance.std() + STD_EPS))).square()
    return POSITION_WEIGHT * kernel.softmax(dim=0).to(like.dtype).to(like.device, non_blocking=True)


def gpu_kernels(values: Tensor) -> Any:
    """The module of PAR's kernels for a GPU, where these values lie on one and Triton is installed; else None."""
    if not values.is_cuda or values.dtype != torch.float32 or find_spec("triton") is None:
        return None
    from .machine import par_kernels

    return par_kernels


@functools.cache
def _on_device(offsets: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The offsets, and the weights of their distances, there: copied once."""
    like = torch.empty((), device=device)
    return torch.tensor(offsets, dtype=torch.int32, device=device), _position_weights(offsets, like)
