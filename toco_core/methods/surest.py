"""The surest part of a label: regions that grow over the training, and a filter of noise.

After "PCRE" (CVPR 2025), whose masks grow from the surest region of a class by a schedule, and "DuPL: Dual Student with
Trustworthy Progressive Learning" (CVPR 2024), which fits a mixture of Gaussians to the segmentation losses of an image
and leaves out the component of high ones. Here both keep a share of what is labelled, ranked within every class of
every image: by CAM value, or by the decoder's loss. A share of the whole image would first take away what is small or
hard: a class that is not learnt yet has high losses everywhere.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toco_core.conventions import IGNORE
from toco_core.machine.device import widest_float
from toco_core.methods.discrepancy import taught_label


def surest(label: Int[Tensor, "B h w"], score: Float[Tensor, "B h w"], share: float) -> Int[Tensor, "B h w"]:
    """The label where its score is among the highest of its class in its image; 255 elsewhere.

    With S(b, c) the places of image b that are labelled c (0 background, 1..; 255 stays), place x of S(b, c) is kept
    where fewer than `share` |S(b, c)| places of S(b, c) have a higher score. So equal scores stay or go together, and
    every class keeps at least one place. `share` above 0; from 1 on the label is returned as it is.
    """
    if share >= 1:
        return label
    score, group = score.detach().flatten(1), label.flatten(1).long()
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))  # class by class, the surest first
    sizes = group.new_zeros(len(group), IGNORE + 1).scatter_add_(1, group, torch.ones_like(group))
    kept = (share * sizes.to(widest_float(sizes.device))).ceil().long()  # in float32 0.6 * 25 is above 15
    last = sizes.cumsum(1) - sizes + kept - 1  # of each class, the last place that is kept
    least = score.gather(1, order).gather(1, last.clamp(min=0)).gather(1, group)
    return label.masked_fill((score < least).view_as(label), IGNORE)


def certainty(slot: Int[Tensor, "B h w"], cam: Float[Tensor, "B k H W"]) -> Float[Tensor, "B h w"]:
    """How sure a CAM is of a label: 1 - the largest value of all classes where it is 0, the value of the k-th class
    where it is k; the CAM resized (bilinearly) to the label's size. Where the label is 255 it means nothing."""
    maps = F.pad(cam.detach(), (0, 0, 0, 0, 1, 0))  # in front of the classes, the background
    if maps.shape[2:] != slot.shape[1:]:
        maps = F.interpolate(maps, size=slot.shape[1:], mode="bilinear", align_corners=False)
    maps[:, 0] = 1 - maps.amax(1)
    return maps.gather(1, slot.masked_fill(slot == IGNORE, 0)[:, None])[:, 0]


def grown(step, slot: Int[Tensor, "B h w"], cam: Float[Tensor, "B k H W"]) -> Int[Tensor, "B h w"]:
    """What of a label, made of a CAM of the labelled classes, teaches on a step: the share of its surest places that
    `LabelConfig.taught_share` says."""
    share = step.config.labels.taught_share(step.config.schedule.progress(step.number))
    return slot if share >= 1 else surest(slot, certainty(slot, cam), share)


def without_noise(logits: Float[Tensor, "B C H W"], label: Int[Tensor, "B H W"], noise: float) -> Int[Tensor, "B H W"]:
    """The label, 255 where its loss is among the highest of its class in its image.

    With p the softmax of `logits`, the `surest` share of 1 - noise by the score log p(label(x), x). `noise` from 0 to
    below 1.
    """
    return surest(label, -F.cross_entropy(logits.detach(), label, ignore_index=IGNORE, reduction="none"), 1 - noise)


def seg_label(step) -> Int[Tensor, "B H W"]:
    """What the decoder learns from in a step: the pseudo label, its own or its rival's, from `seg_noise_start` on
    without its noise. The dense energy keeps all of its own."""
    label, loss = taught_label(step), step.config.loss
    noise = loss.seg_noise if step.number >= loss.seg_noise_start else 0
    return without_noise(step.seg_logits, label, noise) if noise else label
