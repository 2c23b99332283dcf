"""Exchange: the segmentation teaches the CAM back.

After "Weakly Supervised Co-training with Swapping Assignments" (CoSA, ECCV 2024), where a teacher's segmentation is the
soft target of a student's CAM. Here one network gives both, and the target is the class that the decoder chooses among
the image's own.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toco_core.conventions import IGNORE
from toco_core.losses import count_known

SURE = 0.5


def exchange_label(
    seg_logits: Float[Tensor, "B C h w"], image_labels: Float[Tensor, "B K"], *, sure: float = SURE
) -> Int[Tensor, "B K h w"]:
    """1 for the class that the decoder chooses at a token, 0 for the image's other classes; all 0 for the background.

    p(b, c, x) is the softmax of `seg_logits` over the background and the classes of the image, C = K + 1. 255, left
    out: classes that the image does not have, and tokens whose largest p is at most `sure`.
    """
    image_labels = image_labels.to(seg_logits.device)
    possible = F.pad(image_labels, (1, 0), value=1.0)[:, :, None, None] > 0
    p, chosen = seg_logits.detach().float().masked_fill(~possible, -torch.inf).softmax(1).max(1)
    label = F.one_hot(chosen, seg_logits.shape[1]).movedim(-1, 1)[:, 1:]
    return label.masked_fill(~possible[:, 1:] | (p <= sure)[:, None], IGNORE)


def exchange_loss(
    cam_logits: Float[Tensor, "B K h w"],
    label: Int[Tensor, "B K h w"],
    *,
    pairs: Int[Tensor, "1"] | None = None,
    parts: int = 1,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of the CAM's logits z with the decoder's choice t at the same token, 0 or 1.

    With M the pairs of token and class whose label is not 255, and s the sigmoid,

        L = - 1/|M| sum over (b, k, x) in M of [t log s(z) + (1 - t) log(1 - s(z))];   0 where M is empty.

    Where this is one of `parts` equal parts of a batch, `pairs` is |M| of the whole batch, and the mean of the parts'
    results is that of the whole batch.
    """
    counts = label != IGNORE
    cost = F.binary_cross_entropy_with_logits(cam_logits, (label == 1).to(cam_logits.dtype), reduction="none")
    (n,) = count_known(label) if pairs is None else pairs
    return parts * (cost * counts).sum() / n.clamp(min=1)


def exchanged(step) -> Int[Tensor, "B K h w"]:
    """What the decoder teaches the CAM in a step."""
    return exchange_label(step.decoded, step.batch.image_labels)


def exchange(step) -> Float[Tensor, ""]:
    """The final classifier, applied at every token, says what the decoder says there."""
    with torch.autocast(step.batch.images.device.type, enabled=False):
        weight = step.model.classifier.weight[:, :, None, None]
        cam_logits = F.conv2d(step.tokens.patch_map.to(weight.dtype), weight)
    return exchange_loss(cam_logits, step.made(exchanged), pairs=step.count("exchange"), parts=step.parts)
