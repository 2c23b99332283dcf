"""Prototypes: sure patch tokens are drawn to the mean token of their class, over the images of the batch.

After "Separate and Conquer: Decoupling Co-occurrence" (SeCo, CVPR 2024), whose prototypes are moving averages over the
training; here they are means over the batch, so that nothing is kept between steps. Patch token contrast compares the
tokens of one image; prototypes also compare images.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError

TEMPERATURE = 0.1


def prototype_loss(
    patch_tokens: Float[Tensor, "B N D"], token_label: Int[Tensor, "B N"], n_classes: int, *, tau: float = TEMPERATURE
) -> Float[Tensor, ""]:
    """Cross-entropy of cosines to the class means, every class of the batch with the same weight.

    With f the tokens of length 1, S(c) those labelled c (0 background, 1..K; 255 is left out), P(c) the mean of S(c),
    brought to length 1 and without gradient, and A the classes that occur,

        L = 1/|A| sum over c in A of 1/|S(c)| sum over f in S(c) of - log softmax_c'(f . P(c') / tau)[c],  c' in A.

    0 where no token is labelled.
    """
    label = token_label.flatten()
    sure = label != IGNORE
    f, label = F.normalize(patch_tokens.flatten(0, 1)[sure], dim=-1), label[sure].long()
    member = F.one_hot(label, n_classes + 1).to(f.dtype)
    count = member.sum(0)
    mean = F.normalize(member.T @ f.detach(), dim=-1)
    cosines = (f @ mean.T / tau).masked_fill(count == 0, -torch.inf)
    cost = F.cross_entropy(cosines, label, reduction="none") / count[label]
    return cost.sum() / (count > 0).sum().clamp(min=1)


def prototypes(step) -> Float[Tensor, ""]:
    """By the token label of patch token contrast. Raises ToCoError where the step holds a part of its batch only: the
    prototypes are means over all of it."""
    if step.parts > 1:
        raise ToCoError(f"prototypes with a batch in {step.parts} parts is not allowed: one process, one part")
    with torch.autocast(step.batch.images.device.type, enabled=False):
        return prototype_loss(step.tokens.patch_tokens.float(), step.token_label.flatten(1), step.model.n_classes)
