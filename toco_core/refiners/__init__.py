"""Refinements of class scores along the edges of the image, each a frozen record; the table names them.

A refiner is called with images and class probabilities and gives back scores of background and classes. The field
`config.labels.refiner` chooses one by its name; the config's fields that begin with this name fill the record's. A new
one is a file here and a row in `REFINERS`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from toco_core.errors import refuse_other
from toco_core.refiners.crf import DenseCRF
from toco_core.refiners.masks import MaskVote
from toco_core.refiners.none import NoRefinement
from toco_core.refiners.par import PAR


@runtime_checkable
class Refiner(Protocol):
    """Refine class probabilities; without gradient."""

    @property
    def scale(self) -> float:
        """Fraction of the image's size at which scores are refined, above 0 and at most 1."""

    def __call__(
        self, images: Float[Tensor, "B 3 h w"], classes: Sequence[Float[Tensor, "B k h w"]]
    ) -> list[Float[Tensor, "B k1 h w"]]:
        """Turn each set of class probabilities into scores of background and the same classes (k1 = k + 1).

        The sets belong to the same images, each to another background score. Their sum over k is at most 1: the
        background is the remainder. Only the order of the scores at a pixel counts.
        """


@runtime_checkable
class OfImages(Protocol):
    """A refiner that holds something for each image of the batch for which it was built."""

    def of(self, images: Sequence[int]) -> Refiner:
        """Return that of some of the images, by their numbers in the batch."""


REFINERS: dict[str, Callable[..., Refiner]] = {"par": PAR, "crf": DenseCRF, "masks": MaskVote, "none": NoRefinement}


def build_refiner(name: str, **settings: Any) -> Refiner:
    """Build the refiner of that name in `REFINERS`. Raises ToCoError for an unknown name."""
    refuse_other(REFINERS, refiner=name)
    return REFINERS[name](**settings)
