"""Consistency: the decoder says of a recoloured crop what it says of the crop, where no label tells it.

After "DuPL: Dual Student with Trustworthy Progressive Learning" (CVPR 2024), where pixels that the pseudo label leaves
uncertain are taught by the prediction on a weakly varied view. Here one network sees both; the strongly varied view is
the crop with its own colours that class token contrast cuts its local views from.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toco_core.conventions import IGNORE
from toco_core.labels import inside_box

SURE = 0.5


def consistency_loss(
    weak_logits: Float[Tensor, "B C H W"],
    strong_logits: Float[Tensor, "B C H W"],
    label: Int[Tensor, "B H W"],
    *,
    sure: float = SURE,
) -> Float[Tensor, ""]:
    """Cross-entropy of the strongly varied view with the class chosen on the weakly varied one.

    With p the softmax of `weak_logits`, without gradient, q that of `strong_logits`, and U the pixels x whose `label`
    is 255 and whose largest p is above `sure`,

        L = - 1/|U| sum over x in U of log q(argmax_c p(c, x), x);   0 where U is empty.
    """
    p, chosen = weak_logits.detach().softmax(1).max(1)
    chosen = chosen.masked_fill((label != IGNORE) | (p <= sure), IGNORE)
    cost = F.cross_entropy(strong_logits, chosen, ignore_index=IGNORE, reduction="sum")
    return cost / (chosen != IGNORE).sum().clamp(min=1)


def consistency(step) -> Float[Tensor, ""]:
    """Between the main images and the same crops in other colours; padding is left out."""
    label = step.pseudo_label
    label = label.masked_fill(~inside_box(step.batch.valid_box, label.shape[-2:]), 0)
    with step.autocast():
        decoded = step.model.decoder(step.model.encode(step.batch.local_image).patch_map).contiguous()
    strong = F.interpolate(decoded.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)
    return consistency_loss(step.seg_logits, strong, label)
