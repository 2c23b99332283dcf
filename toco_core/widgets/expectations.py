"""Three things that moving the explorer's sliders makes one expect, measured over some images of a session.

1. `beta_h` buys precision: a higher threshold keeps less foreground, and more of what it keeps is right.
2. PAR moves the border of a label to where the image changes.
3. A patch on an object is more like the rest of the object than like the ground.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from toco_core.conventions import IGNORE
from toco_core.widgets.pictures import Picture
from toco_core.widgets.session import Session


class Expectations(NamedTuple):
    """What was measured; arrays run over the images that were, fields of the first two are NaN without a classifier."""

    thresholds: tuple[float, ...]
    kept: Float64[np.ndarray, "M T"]
    """Pixels that the seed label calls foreground at each threshold."""
    right: Float64[np.ndarray, "M T"]
    """Those of them whose class is the mask's."""
    gradient: Float64[np.ndarray, "M 2"]
    """Mean gradient of the image along the label's border, grey levels per pixel: without PAR, with it."""
    similarity: Float64[np.ndarray, "M 2"]
    """Cosine of a patch on an object to the patches of the object, to those of the ground."""

    @property
    def precision(self) -> Float64[np.ndarray, " T"]:
        """Share of the kept pixels that are right at each threshold, over all images, in [0, 1]."""
        return self.right.sum(0) / np.maximum(self.kept.sum(0), 1)

    def __str__(self) -> str:
        """Every finding in a sentence with its numbers: means and standard errors over the images."""
        n, drawn = len(self.kept), self.gradient[np.isfinite(self.gradient).all(1)]
        if not n:
            return "no image with a mask and labels: nothing to measure"
        lines = [f"{n} images, mean ± standard error over the images."]
        if len(drawn):
            kept = self.kept.sum(0)
            lines.append(
                f"1. From beta_h = {self.thresholds[0]:g} to {self.thresholds[-1]:g} the sure foreground shrinks to "
                f"{100 * kept[-1] / max(kept[0], 1):.0f} %; {100 * self.precision[0]:.0f} % of it were right, now "
                f"{100 * self.precision[-1]:.0f} %."
            )
            lines.append(
                f"2. Along the label's border the image changes by {drawn[:, 0].mean():.1f} grey levels per pixel "
                f"without PAR, with it by {_mean_and_error(drawn[:, 1] - drawn[:, 0])} more."
            )
        object_, ground = self.similarity[np.isfinite(self.similarity).all(1)].T
        lines.append(
            f"3. A patch on an object has a cosine of {object_.mean():.2f} to its object, to the ground one that is "
            f"{_mean_and_error(object_ - ground, 2)} lower."
        )
        return "\n".join(lines)


def measure_expectations(
    session: Session, names: Sequence[str], *, thresholds: Sequence[float], block: int | None = None
) -> Expectations:
    """Measure with the settings that the session has, on those of the named images that have a mask and a label.

    The session is moved about: give one that nobody looks at. `block`: of the third, by default the auxiliary one.
    """
    start, subject = session.sides[0].settings, session.subject(0)
    has_cam = len(subject.class_names) > 1
    kept, right, gradient, similarity = [], [], [], []
    for name in names:
        session.go(name)
        picture = session.picture
        if picture.mask is None or not picture.labels or not ((picture.mask > 0) & (picture.mask < IGNORE)).any():
            continue
        session.set(show="seed label", classes="labelled", beta_l=start.beta_l, beta_h=start.beta_h)
        counts = [_counted(session, picture, beta_h) if has_cam else (np.nan, np.nan) for beta_h in thresholds]
        kept.append([count[0] for count in counts])
        right.append([count[1] for count in counts])
        session.set(show="pseudo label", beta_l=start.beta_l, beta_h=start.beta_h)
        gradient.append([_border(session, picture, n) if has_cam else np.nan for n in (0, start.par_iterations)])
        session.set(par_iterations=start.par_iterations, block=block or subject.model.layer)
        similarity.append(_similarity(session, picture))
    T = len(thresholds)
    arrays = [
        np.array(rows, float).reshape(-1, n) for rows, n in ((kept, T), (right, T), (gradient, 2), (similarity, 2))
    ]
    return Expectations(tuple(thresholds), *arrays)


def _mean_and_error(values: np.ndarray, decimals: int = 1) -> str:
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{values.mean():.{decimals}f} ± {error:.{decimals}f}"


def _counted(session: Session, picture: Picture, beta_h: float) -> tuple[int, int]:
    session.set(beta_h=beta_h)
    label, truth = session.label(0), picture.mask
    sure = (label > 0) & (label < IGNORE) & (truth < IGNORE)
    return int(sure.sum()), int((sure & (label == truth)).sum())


def _border(session: Session, picture: Picture, par_iterations: int) -> float:
    """Mean gradient along the border of the label's foreground; NaN where there is none."""
    session.set(par_iterations=par_iterations)
    inside = np.isin(session.label(0), picture.labels)
    border = inside & ~(np.roll(inside, 1, 0) & np.roll(inside, 1, 1))
    steepness = np.hypot(*np.gradient(picture.image.astype(float).mean(-1)))
    return float(steepness[border].mean()) if border.any() else np.nan


def _similarity(session: Session, picture: Picture) -> tuple[float, float]:
    """Of the patch at the object's middle pixel in reading order: to the object of its class, to the background."""
    mask = picture.mask
    rows, columns = np.nonzero((mask > 0) & (mask < IGNORE))
    middle = len(rows) // 2
    session.click((rows[middle] + 0.5) / mask.shape[0], (columns[middle] + 0.5) / mask.shape[1])
    found = session.tokens(0).similarity
    pixels = found[np.ix_(*(np.arange(n) * found.shape[i] // n for i, n in enumerate(mask.shape)))]
    ground = float(pixels[mask == 0].mean()) if (mask == 0).any() else np.nan
    return float(pixels[mask == mask[rows[middle], columns[middle]]].mean()), ground
