"""What kinds of errors a label map makes in one image: every wrong pixel has exactly one kind.

With t the mask's class of a pixel, p the label's, 0 the background, and "in the image" a class that the mask shows
somewhere outside its void pixels:

| kind               | t        | p        | in words |
|--------------------|----------|----------|----------|
| missed part        | a class  | 0        | a part of an object, or all of it, is called background |
| spilled over       | 0        | a class in the image | a label lies on background, around its object or away from it |
| co-occurring class | a class  | another class in the image | one object's label lies on another object |
| wrong class        | anything | a class that is not in the image | the mask calls nothing in the image so |

Pixels where the mask is void (255) or the label undecided (255) are no errors: nothing is said there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError

KINDS = ("missed part", "spilled over", "wrong class", "co-occurring class")


class PixelErrors(NamedTuple):
    """The wrong pixels of one label map by kind."""

    counts: Int64[np.ndarray, " 4"]
    """Wrong pixels of each of `KINDS`."""
    decided: int
    """Pixels that mask and label both name: the right and the wrong ones."""
    undecided: int
    """Pixels that the mask names and the label leaves open."""

    @property
    def rate(self) -> float:
        """Share of the decided pixels that are wrong, in [0, 1]; 0 where nothing is decided."""
        return float(self.counts.sum() / max(self.decided, 1))

    @property
    def shares(self) -> Float64[np.ndarray, " 4"]:
        """Share of each kind among the wrong pixels; they sum to 1, and are all 0 where no pixel is wrong."""
        return self.counts / max(int(self.counts.sum()), 1)

    @property
    def main(self) -> str | None:
        """The kind of the most wrong pixels, the first of `KINDS` among equals; None where no pixel is wrong."""
        return KINDS[int(self.counts.argmax())] if self.counts.any() else None


def error_kinds(label: UInt8[np.ndarray, "h w"], mask: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Return 0 where a pixel is right or nothing is said, else 1 + the place of its kind in `KINDS`.

    Raises ToCoError where label and mask have different sizes.
    """
    if label.shape != mask.shape:
        raise ToCoError(f"the label is {label.shape[0]} x {label.shape[1]}, the mask {mask.shape[0]} x {mask.shape[1]}")
    return _table(np.bincount(mask.ravel(), minlength=256) > 0)[mask, label]


def pixel_errors(label: UInt8[np.ndarray, "h w"], mask: UInt8[np.ndarray, "H W"]) -> PixelErrors:
    """Count the wrong pixels of each kind. Raises ToCoError where label and mask have different sizes."""
    kinds = np.bincount(error_kinds(label, mask).ravel(), minlength=5)
    named = mask != IGNORE
    undecided = int((named & (label == IGNORE)).sum())
    return PixelErrors(kinds[1:], int(named.sum()) - undecided, undecided)


def total_errors(parts: Sequence[PixelErrors]) -> PixelErrors:
    """Sum the errors of several images: shares are then those of all wrong pixels together."""
    counts = np.sum([part.counts for part in parts], axis=0, dtype=np.int64) if parts else np.zeros(4, np.int64)
    return PixelErrors(counts, sum(part.decided for part in parts), sum(part.undecided for part in parts))


def _table(shown: np.ndarray) -> np.ndarray:
    """Kind + 1 of each pair (mask's class, label's class), 256 x 256, where the mask shows the classes `shown`."""
    classes = np.arange(256)
    t, p = classes[:, None], classes[None]
    is_wrong = (t != p) & (t != IGNORE) & (p != IGNORE)
    kind = np.where(p == 0, 1, np.where(~shown[None], 3, np.where(t == 0, 2, 4)))
    return np.where(is_wrong, kind, 0).astype(np.uint8)
