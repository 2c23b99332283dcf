"""Filtering by appearance: the permutohedral lattice, the dense energy loss and the dense CRF that stand on it.

A pixel is a point (x, y, red, green, blue), each divided by its standard deviation. Gaussian filtering in that space
averages pixels that are near and alike. The lattice does it in time linear in the number of pixels (Adams, Baek and
Davis, "Fast high-dimensional filtering using the permutohedral lattice", 2010): every point spreads its value on the
corners of the simplex that it lies in (splat), the lattice is blurred along its axes, every point collects from its
corners (slice). Building the lattice is the expensive half and depends on the image only: build once, filter many
times. Plain torch, any device, nothing compiled.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from .errors import ToCoError
from .labels import IGNORE, upsampled_argmax

PROBABILITY_EPSILON = 1e-20  # least probability whose logarithm the dense CRF takes; keeps a certain 0 finite
NORM_EPSILON = 1e-20  # added to the total weight of a pixel before the square root, as in the common implementation


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
    rows, columns = _nearest_pixels(images, _scaled_size(images, scale))
    small = images[:, :, rows[:, None], columns]
    sigmas = {"sigma_xy": sigma_xy * scale, "sigma_rgb": sigma_rgb}
    if not together:
        return [image_lattice(image, **sigmas) for image in small]
    groups = torch.arange(len(small), device=small.device).repeat_interleave(small[0, 0].numel())
    return [Lattice.build(torch.cat([_image_features(image, **sigmas) for image in small]), groups)]


def dense_energy_loss(
    logits: Float[Tensor, "B C H W"],
    images: Float[Tensor, "B 3 H W"],
    label: Integer[Tensor, "B H W"],
    valid_box: Integer[Tensor, "B 4"] | None = None,
    *,
    weight: float = 1e-7,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
    lattices: Sequence[Lattice] | None = None,
) -> Float[Tensor, ""]:
    """Dense energy of the regularised losses (Tang et al., ECCV 2018): like pixels shall get like labels.

    With S the class probabilities inside `valid_box` (top, bottom, left, right; the whole image if None), W the
    bilateral filter of the image and g a gate per pixel, all at `scale` times the size,

        -weight / B * sum over classes of S^T diag(g) W S

    `g` is 1 where `label` is 255; elsewhere 1 - the pixel's largest probability, so that what is labelled and learnt is
    left alone. It counts as a constant. Probabilities are reduced bilinearly, images and labels to the nearest pixel,
    sizes rounded down.

    Images in [0, 1]. Computed in float32 (float64 logits: float64). `lattices` as made by `energy_lattices` with the
    same settings saves half of the time; without, they are built here, which waits for the device.

    As in the release the gradient with respect to S is -2 weight / B * g W S, as if diag(g) W were symmetric. It is
    not: g differs between pixels, and the lattice blurs axis after axis, which is noticeable on images of a few pixels.
    The published weights were chosen with it.
    """
    B, _, H, W = logits.shape
    if images.shape[-2:] != (H, W) or label.shape[-2:] != (H, W):
        raise ToCoError(
            f"images {tuple(images.shape[-2:])} and label {tuple(label.shape[-2:])}: "
            f"allowed is the size of the logits, {(H, W)}"
        )
    if lattices is None:
        lattices = energy_lattices(images, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, scale=scale)
    if len(lattices) not in (1, B):
        raise ToCoError(f"lattices has {len(lattices)} entries: allowed is one per image, {B}, or one of all")

    with torch.autocast(logits.device.type, enabled=False):
        probs = _at_least_float32(logits).softmax(dim=1)
        size = _scaled_size(logits, scale)
        probs = F.interpolate(probs, size=size, mode="bilinear", align_corners=False)
        rows, columns = _nearest_pixels(logits, size)
        ignored = (label == IGNORE)[:, None, rows[:, None], columns]
        inside = (
            torch.ones_like(probs[:, :1])
            if valid_box is None
            else _inside_box(valid_box, rows, columns).to(probs.dtype)
        )

        segments = probs * inside
        with torch.no_grad():
            gate = (inside - probs.amax(dim=1, keepdim=True)).clamp(min=0).masked_fill(ignored, 1)
            points = segments.movedim(1, -1).reshape(len(lattices), -1, segments.shape[1])
            filtered = torch.cat([lattice.filter(part) for lattice, part in zip(lattices, points, strict=True)])
            filtered = filtered.unflatten(0, (B, *size)).movedim(-1, 1).contiguous().to(probs.dtype)
        twice = -2 * weight / B * (segments * (gate * filtered)).sum()
        return twice - 0.5 * twice.detach()  # the energy, with the gradient of twice the energy


def crf_lattices(
    image: Float[Tensor, "3 H W"],
    *,
    position_sigma: float = 1.0,
    appearance_sigma_xy: float = 121.0,
    appearance_sigma_rgb: float = 5.0,
) -> list[Lattice]:
    """The two lattices of an image in [0, 1] that `dense_crf` needs, position first, reusable for many predictions."""
    positions = _positions(*image.shape[1:], like=_at_least_float32(image))
    return [
        Lattice.build(positions / position_sigma),
        image_lattice(image, sigma_xy=appearance_sigma_xy, sigma_rgb=appearance_sigma_rgb),
    ]


def dense_crf(
    probs: Float[Tensor, "C H W"],
    image: Float[Tensor, "3 H W"],
    *,
    iterations: int = 10,
    position_sigma: float = 1.0,
    position_weight: float = 1.0,
    appearance_sigma_xy: float = 121.0,
    appearance_sigma_rgb: float = 5.0,
    appearance_weight: float = 4.0,
    lattices: Sequence[Lattice] | None = None,
) -> Float[Tensor, "C H W"]:
    """Inference in a fully connected CRF (Krahenbuhl and Koltun, 2011), as applied to segmentations before scoring.

    `probs` are class probabilities (the softmax of logits), the image is in [0, 1]; returns class probabilities that
    follow its edges. Two pixels of different classes pay `position_weight` times a Gaussian of their distance, in
    pixels, and `appearance_weight` times a Gaussian of their distance and of their difference in grey levels (Potts
    model). The defaults are those usual for VOC.

    `lattices` as made by `crf_lattices` with the same standard deviations saves a quarter of the time where an image is
    used again.
    """
    _, H, W = probs.shape
    if image.shape[-2:] != (H, W):
        raise ToCoError(f"image has the size {tuple(image.shape[-2:])}: allowed is that of probs, {(H, W)}")
    if iterations < 0:
        raise ToCoError(f"iterations = {iterations}: allowed are whole numbers from 0")
    if lattices is None:
        lattices = crf_lattices(
            image,
            position_sigma=position_sigma,
            appearance_sigma_xy=appearance_sigma_xy,
            appearance_sigma_rgb=appearance_sigma_rgb,
        )
    weights = (position_weight, appearance_weight)
    kernels = [(weight, lattice.filter) for weight, lattice in zip(weights, lattices, strict=True) if weight]
    with torch.no_grad(), torch.autocast(probs.device.type, enabled=False):
        belief = mean_field(_at_least_float32(probs).flatten(1).T.contiguous(), kernels, iterations)
    return belief.T.unflatten(1, (H, W))


def crf_label(logits: Tensor, unit: Tensor, options: Mapping) -> Tensor:
    """1 H W labels after the dense CRF of logits (1 C H W) on their image (1 3 H W in [0, 1])."""
    return dense_crf(logits[0].softmax(0), unit[0], **options).argmax(0)[None]


def crf_labels(
    images: Float[Tensor, "B 3 H W"],
    cam: Float[Tensor, "B K H W"],
    image_labels: Float[Tensor, "B K"],
    *,
    betas: Sequence[float],
    iterations: int = 10,
    scale: float = 1.0,
    sigma_xy: float = 121.0,
    sigma_rgb: float = 5.0,
) -> Integer[Tensor, "T B H W"]:
    """`labels.refined_labels` with the dense CRF in the place of PAR: the label of each of T background scores, 0..K.

    The probabilities are the same: softmax of the labelled classes' CAMs and a constant background score. `images` in
    [0, 1]. Image and CAM are reduced by `scale` first, `sigma_xy` (in pixels of the whole image) with them. Raises
    ToCoError unless 0 < scale <= 1.
    """
    size = _scaled_size(images, scale)
    sigmas = {"appearance_sigma_xy": sigma_xy * scale, "appearance_sigma_rgb": sigma_rgb}
    label = torch.zeros(len(betas), len(images), *images.shape[2:], dtype=torch.long, device=cam.device)
    for b in range(len(images)):
        classes = torch.nonzero(image_labels[b])[:, 0].to(cam.device)
        if not len(classes):
            continue
        image, maps = (
            F.interpolate(_at_least_float32(x)[None], size=size, mode="bilinear", align_corners=False)[0]
            for x in (images[b], cam[b, classes])
        )
        lattices = crf_lattices(image, **sigmas)
        table = F.pad(classes + 1, (1, 0))
        for t, beta in enumerate(betas):
            probs = torch.cat([torch.full_like(maps[:1], beta), maps]).softmax(dim=0)
            belief = dense_crf(probs, image, iterations=iterations, lattices=lattices, **sigmas)
            label[t, b] = table[upsampled_argmax(belief[None], tuple(images.shape[2:]))[0]]
    return label


def mean_field(
    probs: Float[Tensor, "P C"], kernels: Sequence[tuple[float, Callable[[Tensor], Tensor]]], iterations: int
) -> Float[Tensor, "P C"]:
    """Mean-field inference: start from `probs`; then again and again let every pixel hear what its neighbours believe.

    `kernels` are (weight, filter) pairs; a filter maps P F to P F, linearly. It is divided symmetrically by the square
    roots of its row sums, so its scale does not matter. A pixel hears itself too, as in the common implementation.
    """
    norms = [(apply(torch.ones_like(probs[:, :1])) + NORM_EPSILON).rsqrt() for _, apply in kernels]
    unary = probs.clamp(min=PROBABILITY_EPSILON).log()
    belief = unary.softmax(dim=1)
    for _ in range(iterations):
        evidence = unary.clone()
        for (weight, apply), norm in zip(kernels, norms, strict=True):
            evidence += weight * norm * apply(norm * belief)
        belief = evidence.softmax(dim=1)
    return belief


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
    levels = 255 * _at_least_float32(image).flatten(1).T
    return torch.cat([_positions(*image.shape[1:], like=levels) / sigma_xy, levels / sigma_rgb], dim=1)


def _positions(H: int, W: int, *, like: Tensor) -> Tensor:
    """x, y of every pixel, row by row."""
    y = torch.arange(H, device=like.device, dtype=like.dtype)
    x = torch.arange(W, device=like.device, dtype=like.dtype)
    return torch.stack([x.repeat(H), y.repeat_interleave(W)], dim=1)


def _scaled_size(images: Tensor, scale: float) -> tuple[int, int]:
    H, W = images.shape[-2:]
    if not 0 < scale <= 1:
        raise ToCoError(f"scale = {scale}: allowed are numbers above 0, at most 1")
    return max(1, int(H * scale)), max(1, int(W * scale))


def _nearest_pixels(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows and columns that reduction to the nearest pixel keeps: the first that each small pixel covers."""
    rows, columns = (torch.arange(small, device=images.device) for small in size)
    H, W = images.shape[-2:]
    return rows * H // size[0], columns * W // size[1]


def _inside_box(valid_box: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """B 4 -> B 1 h w: whether each of these pixels lies in its image's box."""
    top, bottom, left, right = valid_box.to(rows.device)[:, :, None].unbind(1)
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
