"""Why a pixel has its label: class scores at it, PAR step by step, who votes, what the losses make of its patch.

PAR is linear in the scores that it starts from. With A the matrix of its weights, divided by their sum of 1.01, and e
the pixel (a row that sums to 1), the score of a class after t steps is

    e A^t M_0 = <e A^t, M_0>,

and row e A^t says where it comes from: how much each pixel's first score counts after t steps. A row costs as much as
one map; one chain of rows gives the scores of all classes, against both thresholds, after every step.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from toco_core import par
from toco_core.conventions import IGNORE
from toco_core.labels import affinity_mask, merged_logits, token_label
from toco_core.par import Affinity
from toco_core.predict.image import ImagePredictor


class Vote(NamedTuple):
    """What one neighbour contributes in a step of PAR."""

    dy: float  # rows below the pixel, in pixels of the image that the model saw
    dx: float  # columns to its right
    y: int  # where it is in the scores, after the border
    x: int
    weight: float  # share of the pixel's next score, all neighbours sum to 1


class PARTrace(NamedTuple):
    """PAR at one pixel. Scores are of background and the classes, and sum to 1."""

    size: tuple[int, int]  # (h, w) of the scores
    pixel: tuple[int, int]  # in them, the nearest one
    high: Float64[Tensor, "T C"]  # against beta_h, before the first step and after each
    low: Float64[Tensor, "T C"]  # against beta_l
    rows: Float64[Tensor, "T h w"]  # how much each pixel's first scores count, each sums to 1
    votes: tuple[Vote, ...]  # all neighbours, the heaviest first
    starts: Float64[Tensor, "C h w"]  # first scores against beta_h

    def slot(self, step: int) -> int:
        """The label after a step: 0 background, i the i-th class, 255 uncertain."""
        high, low = int(self.high[step].argmax()), int(self.low[step].argmax())
        return IGNORE if high == 0 and low != 0 else high


class TokenPairs(NamedTuple):
    """What patch token contrast makes of one patch and the others, by the auxiliary CAM."""

    label: int  # of the patch: 0 background, i the i-th class, 255 uncertain
    relation: Tensor  # h w: 1 pulled together, 0 pushed apart, 255 neither
    cosine: Float[Tensor, "h w"]  # between the patch's token and each other's, last block


def influence(affinity: Affinity, start: Float64[Tensor, "h w"], steps: int) -> Float64[Tensor, "T h w"]:
    """The rows e A^t of the module's equation for t = 0..steps; `start` is e. Weights are divided by their sum."""
    weights = affinity.weights[:, 0].to(torch.float64)
    weights = weights / weights.sum(0)
    h, w = start.shape
    reach = max(max(abs(dy), abs(dx)) for dy, dx in affinity.offsets)
    rows, y, x = [start], *(torch.arange(-reach, length + reach).clamp(0, length - 1) for length in (h, w))
    for _ in range(steps):
        padded = torch.zeros(h + 2 * reach, w + 2 * reach, dtype=torch.float64)
        for weight, (dy, dx) in zip(weights, affinity.offsets, strict=True):
            padded[reach + dy : reach + dy + h, reach + dx : reach + dx + w] += weight * rows[-1]
        folded = torch.zeros(h, w + 2 * reach, dtype=torch.float64).index_add_(0, y, padded)  # beyond the border is
        rows.append(torch.zeros(h, w, dtype=torch.float64).index_add_(1, x, folded))  # the border's pixel again
    return torch.stack(rows)


def trace_par(
    images: Float[Tensor, "1 3 H W"],
    cams: Float[Tensor, "1 k H W"],
    pixel: tuple[int, int],
    *,
    beta_l: float,
    beta_h: float,
    iterations: int = par.ITERATIONS,
    dilations: tuple[int, ...] = par.DILATIONS,
    scale: float = 0.5,
    known: dict | None = None,
) -> PARTrace:
    """PAR as `labels.pseudo_label` applies it, at one pixel (y, x) of the image. `images` in [0, 1].

    `known` is filled with what depends on the image alone, and spares it the next time.
    """
    size = tuple(images.shape[2:])
    small = tuple(max(1, math.floor(length * scale)) for length in size)
    known = {} if known is None else known
    if (small, dilations) not in known:
        resized = _resized(images, small)
        known[small, dilations] = Affinity(
            *(part.cpu() if isinstance(part, Tensor) else part for part in par.affinity(resized, dilations=dilations))
        )
    affinity = known[small, dilations]
    chain = (small, dilations, pixel, iterations)
    if chain not in known:
        for key in [key for key in known if len(key) == 4]:
            del known[key]
        known[chain] = influence(affinity, corners(pixel, size, small), iterations)
    rows = known[chain]
    strength = _resized(cams.cpu(), small)[0].to(torch.float64).exp()
    maps = {}
    for name, beta in (("high", beta_h), ("low", beta_l)):
        classes = strength / (torch.tensor(beta, dtype=torch.float64).exp() + strength.sum(0))
        maps[name] = torch.cat([1 - classes.sum(0, keepdim=True), classes])
    high, low = (torch.einsum("thw,chw->tc", rows, maps[name]) for name in ("high", "low"))
    y, x = divmod(int(rows[0].argmax()), small[1])
    return PARTrace(small, (y, x), high, low, rows, _votes(affinity, y, x, size, small), maps["high"])


def corners(pixel: tuple[int, int], size: tuple[int, int], small: tuple[int, int]) -> Float64[Tensor, "h w"]:
    """Weights with which bilinear interpolation from `small` to `size` makes one pixel (y, x)."""
    sides = []
    for place, length, n in zip(pixel, size, small, strict=True):
        at = max((place + 0.5) * n / length - 0.5, 0.0)
        first, side = int(at), torch.zeros(n, dtype=torch.float64)
        side[first] += 1 - (at - first)
        side[min(first + 1, n - 1)] += at - first
        sides.append(side)
    return torch.outer(*sides)


def token_pairs(
    predictor: ImagePredictor, patch: int, classes: Sequence[int], *, beta_l: float, beta_h: float, **which
) -> TokenPairs:
    """Patch token contrast from one patch's point of view, over the whole image (training sees crops of it).

    `which` are scales and mirroring of the auxiliary CAM, as in `ImagePredictor.cam`.
    """
    cam = predictor.cam(classes=classes, auxiliary=True, **which)
    label = token_label(cam, torch.ones(1, len(classes)), predictor.grid, beta_l=beta_l, beta_h=beta_h)
    relation = affinity_mask(label)[0, patch].unflatten(0, predictor.grid).cpu()
    cosine = torch.from_numpy(predictor.similarity(predictor.model.depth, patch))
    return TokenPairs(int(label.flatten()[patch]), relation, cosine)


def decoder_probabilities(predictor: ImagePredictor, pixel: tuple[int, int]) -> Float[Tensor, " C"]:
    """Softmax of the decoder at a pixel of the native image."""
    return merged_logits([predictor.seg_logits], predictor.size)[0, :, pixel[0], pixel[1]].softmax(0).cpu()


def _votes(affinity: Affinity, y: int, x: int, size: tuple[int, int], small: tuple[int, int]) -> tuple[Vote, ...]:
    weights = affinity.weights[:, 0, y, x].to(torch.float64)
    scale = size[0] / small[0], size[1] / small[1]
    votes = [
        Vote(dy * scale[0], dx * scale[1], min(max(y + dy, 0), small[0] - 1), min(max(x + dx, 0), small[1] - 1), share)
        for (dy, dx), share in zip(affinity.offsets, (weights / weights.sum()).tolist(), strict=True)
    ]
    return tuple(sorted(votes, key=lambda vote: -vote.weight))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    maps = par.full_precision(maps)
    return maps if maps.shape[2:] == size else F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
