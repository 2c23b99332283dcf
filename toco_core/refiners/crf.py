"""The dense CRF (Krähenbühl and Koltun, 2011): mean field over the Potts model, on the permutohedral lattice."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toco_core.errors import ToCoError
from toco_core.lattice import Lattice, _positions, at_least_float32, image_lattice

PROBABILITY_EPSILON = 1e-20  # least probability whose logarithm the dense CRF takes; keeps a certain 0 finite
NORM_EPSILON = 1e-20  # added to the total weight of a pixel before the square root, as in the common implementation


@dataclass(frozen=True)
class CRFSettings:
    """Two pixels of different classes pay `position_weight` times a Gaussian of their distance, in pixels, and
    `appearance_weight` times a Gaussian of their distance and of their difference in grey levels (Potts model). The
    defaults are those usual for VOC."""

    iterations: int = 10
    position_sigma: float = 1.0
    position_weight: float = 1.0
    appearance_sigma_xy: float = 121.0
    appearance_sigma_rgb: float = 5.0
    appearance_weight: float = 4.0


@dataclass(frozen=True)
class DenseCRF(CRFSettings):
    """The dense CRF as a refiner; `appearance_sigma_xy` in pixels of the whole image."""

    scale: float = 1.0

    def __call__(
        self, images: Float[Tensor, "B 3 h w"], classes: Sequence[Float[Tensor, "B k h w"]]
    ) -> list[Float[Tensor, "B k1 h w"]]:
        """Mean field from each set of probabilities; the lattices of an image serve all of them."""
        settings = dataclasses.asdict(self)
        settings["appearance_sigma_xy"] *= settings.pop("scale")
        refined: list[list[Tensor]] = [[] for _ in classes]
        for b, image in enumerate(images):
            lattices = crf_lattices(image, **settings)
            for found, part in zip(refined, classes, strict=True):
                probs = torch.cat([1 - part[b].sum(0, keepdim=True), part[b]])
                found.append(dense_crf(probs, image, lattices=lattices, **settings))
        return [torch.stack(found) for found in refined]


def crf_lattices(image: Float[Tensor, "3 H W"], **settings: Any) -> list[Lattice]:
    """The two lattices of an image in [0, 1] that `dense_crf` needs, position first, reusable for many predictions with
    the same `settings`, fields of `CRFSettings`."""
    crf = CRFSettings(**settings)
    positions = _positions(*image.shape[1:], like=at_least_float32(image))
    return [
        Lattice.build(positions / crf.position_sigma),
        image_lattice(image, sigma_xy=crf.appearance_sigma_xy, sigma_rgb=crf.appearance_sigma_rgb),
    ]


def dense_crf(
    probs: Float[Tensor, "C H W"],
    image: Float[Tensor, "3 H W"],
    *,
    lattices: Sequence[Lattice] | None = None,
    **settings: Any,
) -> Float[Tensor, "C H W"]:
    """Inference in a fully connected CRF (Krahenbuhl and Koltun, 2011), as applied to segmentations before scoring.

    `probs` are class probabilities (the softmax of logits), the image is in [0, 1]; returns class probabilities that
    follow its edges. `settings` are fields of `CRFSettings`.

    `lattices` as made by `crf_lattices` with the same standard deviations saves a quarter of the time where an image is
    used again.
    """
    _, H, W = probs.shape
    if image.shape[-2:] != (H, W):
        raise ToCoError(f"image has the size {tuple(image.shape[-2:])}: allowed is that of probs, {(H, W)}")
    crf = CRFSettings(**settings)
    if crf.iterations < 0:
        raise ToCoError(f"iterations = {crf.iterations}: allowed are whole numbers from 0")
    lattices = crf_lattices(image, **settings) if lattices is None else lattices
    weights = (crf.position_weight, crf.appearance_weight)
    kernels = [(weight, lattice.filter) for weight, lattice in zip(weights, lattices, strict=True) if weight]
    with torch.no_grad(), torch.autocast(probs.device.type, enabled=False):
        belief = mean_field(at_least_float32(probs).flatten(1).T.contiguous(), kernels, crf.iterations)
    return belief.T.unflatten(1, (H, W))


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
