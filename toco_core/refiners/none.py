"""No refinement: the label of two thresholds as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class NoRefinement:
    """Hand the probabilities back, the remainder as background."""

    scale: float = 1.0

    def __call__(
        self, images: Float[Tensor, "B 3 h w"], classes: Sequence[Float[Tensor, "B k h w"]]
    ) -> list[Float[Tensor, "B k1 h w"]]:
        """Prepend the background, 1 - the sum over the classes."""
        return [torch.cat([1 - part.sum(1, keepdim=True), part], dim=1) for part in classes]
