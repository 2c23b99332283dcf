"""How well a map of real numbers, such as an attention map, covers the objects of a mask.

Such maps have no natural threshold. Average precision needs none; for the other scores the highest places count as
object, as many as the object has pixels, so that a map is judged by where it is high and not by how high.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Num, Shaped

from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.evaluation.metrics import average_precision

TOLERANCE = 0.03  # of the image's diagonal: how far two outlines may be apart and still agree


class MapScores(NamedTuple):
    """Scores of one map on one image, each in [0, 1]."""

    average_precision: float
    """Of the pixels, ranked by the map."""
    iou: float
    """Of the object and the highest pixels, equally many."""
    outline_f: float
    """Of the outlines of the two: harmonic mean of the shares of each that are near the other."""
    chance: float
    """The object's share of the pixels: the average precision of a constant map, expected of a random one."""


def map_scores(
    values: Num[np.ndarray, "h w"], mask: Shaped[np.ndarray, "H W"], *, tolerance: float = TOLERANCE
) -> MapScores:
    """Score a map, brought to the mask's size bilinearly, against everything that is neither background nor 255.

    Void pixels (255) do not count, and whether the map is high there is nobody's business. tolerance: distance within
    which outlines agree, as a share of the image's diagonal. Raises ToCoError where the mask has no object or nothing
    but objects: no map can be right or wrong then.
    """
    height, width = mask.shape
    seen, truth = mask != IGNORE, (mask != IGNORE) & (mask != 0)
    if not truth.any() or truth[seen].all():
        raise ToCoError("the mask shows no object, or nothing but objects: a map cannot be scored by it")
    large = cv2.resize(values.astype(np.float64), (width, height), interpolation=cv2.INTER_LINEAR)
    found = highest(large, int(truth.sum()), seen)
    return MapScores(
        average_precision=average_precision(large[seen], truth[seen]),
        iou=float((found & truth).sum() / (found | truth).sum()),
        outline_f=outline_f(found, truth, seen, reach=tolerance * float(np.hypot(height, width))),
        chance=float(truth[seen].mean()),
    )


def highest(values: Num[np.ndarray, "H W"], n: int, seen: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The `n` highest of the places that are `seen`; among equal ones those that come first, row by row."""
    found = np.zeros(values.size, bool)
    order = np.argsort(np.where(seen, -values.astype(np.float64), np.inf).ravel(), kind="stable")
    found[order[:n]] = True
    return found.reshape(values.shape) & seen


def outline_f(
    found: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], seen: Bool[np.ndarray, "H W"], *, reach: float
) -> float:
    """Boundary F of two regions: their outlines agree where they are at most `reach` pixels apart.

    Outline: pixels of a region with one of the four neighbours in the image outside of it. Pixels that are not `seen`
    belong to no outline. 0 where a region has no outline.
    """
    mine, other = outline(found) & seen, outline(truth) & seen
    if not mine.any() or not other.any():
        return 0.0
    precision = (_distance_to(other)[mine] <= reach).mean()
    recall = (_distance_to(mine)[other] <= reach).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def outline(region: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels of a region with one of the four neighbours outside of it; the image's border is no neighbour."""
    padded = np.pad(region, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return region & ~inner


def _distance_to(places: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pixel to the nearest of `places`, in pixels."""
    return cv2.distanceTransform((~places).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
