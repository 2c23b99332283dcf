"""Pixel-adaptive refinement (`toco_core.par`) as a refiner: what the paper refines its pseudo labels with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from toco_core import par


@dataclass(frozen=True)
class PAR:
    """PAR of the classes; all background scores share one affinity."""

    iterations: int = par.ITERATIONS
    dilations: tuple[int, ...] = par.DILATIONS
    scale: float = 0.5

    def __call__(
        self, images: Float[Tensor, "B 3 h w"], classes: Sequence[Float[Tensor, "B k h w"]]
    ) -> list[Float[Tensor, "B k1 h w"]]:
        """Probabilities sum to 1 and PAR is linear, so the background is what the classes leave: it is not refined
        itself."""
        total = (1 + par.POSITION_WEIGHT) ** self.iterations
        weights = par.affinity(images, dilations=self.dilations)
        refined = par.apply(weights, torch.cat(list(classes), dim=1), iterations=self.iterations)
        return [
            torch.cat([total - part.sum(1, keepdim=True), part], dim=1) for part in refined.chunk(len(classes), dim=1)
        ]
