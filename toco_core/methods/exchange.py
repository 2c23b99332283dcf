"""Exchange: the segmentation teaches the CAM back.

After "Weakly Supervised Co-training with Swapping Assignments" (CoSA, ECCV 2024), where a teacher's segmentation is the
soft target of a student's CAM. Here one network gives both, and the target is the class that the decoder chooses among
the image's own.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SURE = 0.5


def exchange_loss(
    cam_logits: Float[Tensor, "B K h w"],
    seg_logits: Float[Tensor, "B C h w"],
    image_labels: Float[Tensor, "B K"],
    *,
    sure: float = SURE,
) -> Float[Tensor, ""]:
    """Binary cross-entropy of the CAM's logits z with the class that the decoder chooses at the same token.

    p(b, c, x) is the softmax of `seg_logits` over the background and the classes Y(b) of the image, C = K + 1. With M
    the tokens whose largest p is above `sure`, together with each class k of their image,

        L = - 1/|M| sum over (b, k, x) in M of [t log s(z) + (1 - t) log(1 - s(z))],   t = 1 where k = argmax_c p

    and s the sigmoid; 0 where M is empty. No gradient reaches the decoder.
    """
    image_labels = image_labels.to(cam_logits.device)
    with torch.no_grad():
        possible = F.pad(image_labels, (1, 0), value=1.0)[:, :, None, None] > 0
        p, chosen = seg_logits.detach().float().masked_fill(~possible, -torch.inf).softmax(1).max(1)
        target = F.one_hot(chosen, seg_logits.shape[1]).movedim(-1, 1)[:, 1:].to(cam_logits.dtype)
        counts = (image_labels[:, :, None, None] > 0) & (p > sure)[:, None]
    cost = F.binary_cross_entropy_with_logits(cam_logits, target, reduction="none")
    return (cost * counts).sum() / counts.sum().clamp(min=1)


def exchange(step) -> Float[Tensor, ""]:
    """The final classifier, applied at every token, says what the decoder says there."""
    with torch.autocast(step.batch.images.device.type, enabled=False):
        weight = step.model.classifier.weight[:, :, None, None]
        cam_logits = F.conv2d(step.tokens.patch_map.to(weight.dtype), weight)
    return exchange_loss(cam_logits, step.decoded, step.batch.image_labels)
