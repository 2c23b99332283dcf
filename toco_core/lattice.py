"""Filtering by appearance: the permutohedral lattice, on which the dense energy loss and the dense CRF stand.

A pixel is a point (x, y, red, green, blue), each divided by its standard deviation. Gaussian filtering in that space
averages pixels that are near and alike. The lattice does it in time linear in the number of pixels (Adams, Baek and
Davis, "Fast high-dimensional filtering using the permutohedral lattice", 2010): every point spreads its value on the
corners of the simplex that it lies in (splat), the lattice is blurred along its axes, every point collects from its
corners (slice). Building the lattice is the expensive half and depends on the image only: build once, filter many
times. Plain torch, any device, nothing compiled.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .errors import ToCoError


@dataclass(frozen=True)
class Lattice:
    """The permutohedral lattice of P points with d features: the corners around each point, and their neighbours.

    Made by `Lattice.build`, `image_lattice` or `energy_lattices`; tensors only, so it can be made in a loader's worker
    and sent to a device with `to`.
    """

    corners: Int[Tensor, "P d1"]  # the d + 1 lattice vertices around each point
    weights: Float[Tensor, "P d1"]  # barycentric, sum 1
    splat_points: Int[Tensor, " E"]  # the P (d + 1) pairs (point, vertex) sorted by vertex: the point
    splat_weights: Float[Tensor, " E"]  # and its weight
    splat_starts: Int[Tensor, " M1"]  # where each of the M vertices begins in that list; vertex M is empty and stays 0
    blur: Int[Tensor, "d1 M1 3"]  # per axis each vertex and its two neighbours; M where there is none

    @staticmethod
    def build(features: Float[Tensor, "P d"], groups: Int[Tensor, " P"] | None = None) -> "Lattice":
        """The lattice of points whose features are already divided by their standard deviations.

        Points of different `groups` (whole numbers) have nothing in common: the lattices of several images in one.

        Waits for the device twice, as the number of vertices M depends on the values. Features so large that the
        vertices cannot be numbered by 64 bits are refused, and so is what is not finite.
        """
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            finite = features.isfinite().all()
            origin, rank, weights = _enclosing_simplex(features.nan_to_num(0.0, 0.0, 0.0))
            return _connect(origin, rank, weights, groups, finite)

    def filter(self, values: Float[Tensor, "P F"]) -> Float[Tensor, "P F"]:
        """Splat, blur, slice. Linear in `values`; approximately sum over q of exp(-|f_p - f_q|^2 / 2) value_q, the
        point itself included, times a constant that depends on d (about 0.57 for five features). No gradient flows
        through."""
        if values.shape[0] != self.corners.shape[0]:
            raise ToCoError(
                f"values has {values.shape[0]} points: allowed is the number in the lattice, {self.corners.shape[0]}"
            )
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            values = values.to(self.weights.dtype).contiguous()
            lattice = _weighted_sum(values, self.splat_points, self.splat_weights, self.splat_starts)
            share = values.new_full((lattice.shape[0], 3), 0.5)
            share[:, 0] = 1
            for rows in self.blur:
                lattice = _weighted_sum(lattice, rows, share)
            gain = 1 / (1 + 2.0 ** (1 - self.corners.shape[1]))
            return gain * _weighted_sum(lattice, self.corners, self.weights)

    def to(self, device: torch.device | str) -> "Lattice":
        """The same lattice on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})


def image_lattice(image: Float[Tensor, "3 H W"], *, sigma_xy: float, sigma_rgb: float) -> Lattice:
    """The lattice of all pixels of an image in [0, 1], row by row. `sigma_xy` in pixels, `sigma_rgb` in 255ths."""
    return Lattice.build(_image_features(image, sigma_xy=sigma_xy, sigma_rgb=sigma_rgb))


def energy_lattices(
    images: Float[Tensor, "B 3 H W"],
    *,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
    together: bool | None = None,
) -> list[Lattice]:
    """The lattices as `dense_energy_loss` needs them, to be made ahead of time, for instance in the loader.

    The settings must be those of the loss. Images in [0, 1] are reduced by `scale` to the nearest pixel; `sigma_xy`
    shrinks with them.

    together: one lattice of all images instead of one each, which has to wait for the device, and to launch its many
        small kernels, once instead of B times; None: on all devices but the CPU, whose caches one image suits better.
    """
    if together is None:
        together = images.device.type != "cpu"
    rows, columns = nearest_pixels(images, scaled_size(images, scale))
    small = images[:, :, rows[:, None], columns]
    sigmas = {"sigma_xy": sigma_xy * scale, "sigma_rgb": sigma_rgb}
    if not together:
        return [image_lattice(image, **sigmas) for image in small]
    groups = torch.arange(len(small), device=small.device).repeat_interleave(small[0, 0].numel())
    return [Lattice.build(torch.cat([_image_features(image, **sigmas) for image in small]), groups)]


def _enclosing_simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P d -> nearest remainder-0 vertex, rank of each coordinate, and barycentric weights, as (d + 1) P each.

    The lattice lies in the plane of d + 1 coordinates that sum to 0. Its vertices are whole numbers, equal modulo
    (d + 1). Features are stretched so that the blur [1/2 1 1/2] along all axes is a Gaussian of standard deviation 1. A
    point on the border of two simplices belongs to either; they differ in vertices of weight 0, which the blur sees.
    """
    P, d = features.shape
    index = torch.arange(d, device=features.device, dtype=features.dtype)
    scaled = features.T * (math.sqrt(2 / 3) * (d + 1) / ((index + 1) * (index + 2)).sqrt())[:, None]
    # coordinate j is the sum of the scaled features from j on, less j times the one before
    tails = torch.cat([scaled.flip(0).cumsum(0).flip(0), scaled.new_zeros(1, P)])
    point = tails.clone()
    point[1:] -= (index + 1)[:, None] * scaled

    origin = (point / (d + 1)).round() * (d + 1)
    excess = (
        origin.sum(0) / (d + 1)
    ).round()  # rounding each coordinate by itself may leave the plane by this many steps
    offset = point - origin
    rank = torch.zeros_like(point)  # 0 for the largest offset; the earlier coordinate first among equals
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            later_first = offset[i] < offset[j]
            rank[i] += later_first
            rank[j] += ~later_first
    rank += excess  # step the most wrongly rounded coordinates back into the plane
    step = (rank < 0).to(rank) - (rank > d).to(rank)
    origin += step * (d + 1)
    rank += step * (d + 1)

    offset = (point - origin) / (d + 1)
    rank = rank.long()
    descending = torch.empty_like(offset).scatter_(0, rank, offset)
    weights = torch.cat([1 + descending[-1:] - descending[:1], (descending[:-1] - descending[1:]).flip(0)])
    return origin.long(), rank, weights


def _connect(origin: Tensor, rank: Tensor, weights: Tensor, groups: Tensor | None, finite: Tensor) -> Lattice:
    """Number the vertices that are touched, and find the neighbours of each along every axis."""
    axes, P = origin.shape
    d, device = axes - 1, origin.device
    # A vertex is named by its first d coordinates, and its group, packed in one integer with room for a step of d on
    # both sides, so that a step along an axis is one addition.
    parts = origin[:d] if groups is None else torch.cat([origin[:d], groups[None]])
    low, high, finite = torch.stack([*torch.aminmax(parts, dim=1), finite.long().expand(len(parts))]).tolist()
    if not finite[0]:
        raise ToCoError("features holds NaN or infinity: allowed are finite values")
    extents = [h - l + 4 * d + 3 for h, l in zip(high, low, strict=True)]
    if math.prod(extents) >= 2**63:
        raise ToCoError("features are too large for a lattice: allowed are larger standard deviations")
    strides = [math.prod(extents[:j]) for j in range(len(parts))]
    name = sum((part - least + 2 * d + 1) * stride for part, least, stride in zip(parts, low, strides, strict=True))
    keys = []
    for k in range(axes):
        wrapped = sum((rank[j] > d - k).long() * strides[j] for j in range(d))
        keys.append(name + k * sum(strides[:d]) - wrapped * axes)
    keys = torch.stack(keys, dim=1).flatten()  # point by point

    ordered, order = keys.sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    starts = first.nonzero().squeeze(1)
    table = ordered[starts]
    M = table.shape[0]
    corners = torch.empty_like(keys)
    corners[order] = first.cumsum(0) - 1

    steps = [axes * strides[j] - sum(strides[:d]) for j in range(d)] + [-sum(strides[:d])]
    wanted = table + torch.tensor(steps).to(device, non_blocking=True)[:, None]  # axes M
    found = _search_ascending(table, wanted).clamp_(max=M - 1)
    after = F.pad(found.masked_fill_(table[found] != wanted, M), (0, 1), value=M)
    itself = torch.arange(M + 1, device=device).expand(axes, -1)
    before = torch.full_like(after, M).scatter_(1, after, itself)  # if one is after the other, the other is before it
    before[:, M] = M  # where the scatter put those that have none after them
    return Lattice(
        corners=corners.view(P, axes),
        weights=weights.T.contiguous(),
        splat_points=order.div(axes, rounding_mode="floor"),
        splat_weights=weights.T.flatten()[order],
        splat_starts=F.pad(starts, (0, 1), value=keys.numel()),
        blur=torch.stack([itself, after, before], dim=2),
    )


def _search_ascending(table: Int[Tensor, " M"], wanted: Int[Tensor, "A M"]) -> Int[Tensor, "A M"]:
    """torch.searchsorted; rows that ascend are faster in NumPy, which starts from the place that it found last."""
    if table.device.type != "cpu":
        return torch.searchsorted(table, wanted)
    return torch.from_numpy(np.searchsorted(table.numpy(), wanted.numpy()))


def _weighted_sum(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """Row s is the sum over e of weights[s, e] * table[rows[s, e]]; with `starts`, over e from start s to the next."""
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)


def _image_features(image: Tensor, *, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """x, y, red, green, blue of every pixel, row by row, in standard deviations."""
    levels = 255 * at_least_float32(image).flatten(1).T
    return torch.cat([_positions(*image.shape[1:], like=levels) / sigma_xy, levels / sigma_rgb], dim=1)


def _positions(H: int, W: int, *, like: Tensor) -> Tensor:
    """x, y of every pixel, row by row."""
    y = torch.arange(H, device=like.device, dtype=like.dtype)
    x = torch.arange(W, device=like.device, dtype=like.dtype)
    return torch.stack([x.repeat(H), y.repeat_interleave(W)], dim=1)


def scaled_size(images: Tensor, scale: float) -> tuple[int, int]:
    H, W = images.shape[-2:]
    if not 0 < scale <= 1:
        raise ToCoError(f"scale = {scale}: allowed are numbers above 0, at most 1")
    return max(1, int(H * scale)), max(1, int(W * scale))


def nearest_pixels(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows and columns that reduction to the nearest pixel keeps: the first that each small pixel covers."""
    rows, columns = (torch.arange(small, device=images.device) for small in size)
    H, W = images.shape[-2:]
    return rows * H // size[0], columns * W // size[1]


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
