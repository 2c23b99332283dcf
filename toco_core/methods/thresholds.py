"""Thresholds that move in training: by a schedule, and with the CAM values of the batch.

After "DuPL: Dual Student with Trustworthy Progressive Learning" (CVPR 2024), whose upper threshold falls by a cosine
(`LabelConfig.thresholds`), and "Weakly Supervised Co-training with Swapping Assignments" (CoSA, ECCV 2024), which fits
two clusters to the CAM values of a batch. Here the clusters are those of Otsu's threshold, which needs no iteration and
keeps nothing between steps. Both are for the labels of training; what is made after it has the config's thresholds.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toco_core.errors import ToCoError
from toco_core.labels import inside_box

BINS = 256


def otsu_threshold(values: Float[Tensor, " n"]) -> float | None:
    """The threshold that parts values in [0, 1] into two classes of the largest variance between them (Otsu, 1979).

    With h(i) the number of values in bin i of 256 equal ones, n0(k) and n1(k) those in the bins 0..k and k + 1..255,
    and m0(k), m1(k) the means of their bins,

        threshold = (k* + 1) / 256,   k* = argmax over k of n0(k) n1(k) (m0(k) - m1(k))^2;   the first of equal ones.

    None where fewer than two bins have a value: there is nothing to part. Waits for the device.
    """
    h = torch.bincount((values.detach() * BINS).long().clamp(0, BINS - 1), minlength=BINS).cpu().double()
    if (h > 0).sum() < 2:
        return None
    n0, s0 = h.cumsum(0), (h * torch.arange(BINS)).cumsum(0)
    n1, s1 = n0[-1] - n0, s0[-1] - s0
    between = n0 * n1 * (s0 / n0.clamp(min=1) - s1 / n1.clamp(min=1)).square()
    return (int(between.argmax()) + 1) / BINS


def moved_thresholds(centre: float | None, *, beta_l: float, beta_h: float) -> dict:
    """The keywords `beta_l` and `beta_h` of an interval of the same width about `centre`, as near to it as [0, 1]
    allows; None leaves them where they are."""
    if centre is None:
        return {"beta_l": beta_l, "beta_h": beta_h}
    width = beta_h - beta_l
    low = min(max(centre - width / 2, 0.0), 1 - width)
    return {"beta_l": low, "beta_h": min(low + width, 1.0)}


def thresholds(step, cam: Float[Tensor, "B k H W"]) -> dict:
    """The keywords `beta_l` and `beta_h` with which a step makes labels of a CAM of the labelled classes.

    `dynamic_thresholds`: about Otsu's threshold of the CAM's largest value at every pixel inside `valid_box`. Raises
    ToCoError where the step then holds a part of its batch only: the values are those of all of it.
    """
    config = step.config.labels
    betas = config.thresholds(step.config.schedule.progress(step.number))
    if not config.dynamic_thresholds:
        return betas
    if step.parts > 1:
        raise ToCoError(f"dynamic_thresholds with a batch in {step.parts} parts is not allowed: one process, one part")
    largest = F.pad(cam, (0, 0, 0, 0, 1, 0)).amax(1)  # with a map of 0, as an image may have no class
    inside = inside_box(step.batch.valid_box, largest.shape[1:])
    return moved_thresholds(otsu_threshold(largest[inside]), **betas)
