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
from toco_core.losses import count_known

SURE = 0.5


def consistency_label(
    logits: Float[Tensor, "B C H W"], label: Int[Tensor, "B H W"], *, sure: float = SURE
) -> Int[Tensor, "B H W"]:
    """The class that the decoder chooses on the weakly varied view, 0..K, where `label` is 255 and the class's softmax
    above `sure`; 255 elsewhere."""
    p, chosen = logits.detach().softmax(1).max(1)
    return chosen.masked_fill((label != IGNORE) | (p <= sure), IGNORE)


def consistency_loss(
    logits: Float[Tensor, "B C H W"],
    label: Int[Tensor, "B H W"],
    *,
    pixels: Int[Tensor, "1"] | None = None,
    parts: int = 1,
) -> Float[Tensor, ""]:
    """Cross-entropy of the strongly varied view with the class chosen on the weakly varied one.

    With q the softmax of `logits`, and U the pixels x whose label c(x) is not 255,

        L = - 1/|U| sum over x in U of log q(c(x), x);   0 where U is empty.

    Where this is one of `parts` equal parts of a batch, `pixels` is |U| of the whole batch, and the mean of the parts'
    results is that of the whole batch.
    """
    cost = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    (n,) = count_known(label) if pixels is None else pixels
    return parts * cost / n.clamp(min=1)


def unsure_choice(step) -> Int[Tensor, "B H W"]:
    """What the decoder teaches itself in a step; padding is left out."""
    label = step.pseudo_label
    label = label.masked_fill(~inside_box(step.batch.valid_box, label.shape[-2:]), 0)
    return consistency_label(step.seg_logits, label)


def consistency(step) -> Float[Tensor, ""]:
    """Between the main images and the same crops in other colours."""
    label = step.made(unsure_choice)
    with step.autocast():
        decoded = step.model.decoder(step.model.encode(step.batch.local_image).patch_map).contiguous()
    strong = F.interpolate(decoded.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)
    return consistency_loss(strong, label, pixels=step.count("consistency"), parts=step.parts)
