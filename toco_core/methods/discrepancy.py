"""Discrepancy: two networks that teach each other shall not agree, lest they share each other's errors.

After "DuPL: Dual Student with Trustworthy Progressive Learning" (CVPR 2024), whose two students have backbones that
begin alike and heads that do not. How the second one is trained, the rival, is in `train.rival`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toco_core.errors import ToCoError


def discrepancy_loss(patch_tokens: Float[Tensor, "B N D"], rivals: Float[Tensor, "B N D"]) -> Float[Tensor, ""]:
    """One more than the mean cosine of a network's patch tokens f with its rival's g at the same places, in [0, 2].

        L = 1 + 1/(B N) sum over b, n of cos(f(b, n), g(b, n)).

    DuPL's equation for one of its two students. No gradient reaches g; and where f and g are parallel none reaches f,
    as their cosine has its maximum there.
    """
    return 1 + F.cosine_similarity(patch_tokens, rivals.detach(), dim=-1).mean()


def taught_label(step) -> Int[Tensor, "B H W"]:
    """The pseudo label that the decoder learns from in a step: its network's own, or its rival's where it has one."""
    return step.pseudo_label if step.rival is None else step.rival.pseudo_label


def discrepancy(step) -> Float[Tensor, ""]:
    """Between the final patch tokens of both networks. Raises ToCoError for a step whose network has no rival."""
    if step.rival is None:
        raise ToCoError("the term discrepancy in a step without a rival is not allowed: two networks")
    with torch.autocast(step.batch.images.device.type, enabled=False):
        return discrepancy_loss(step.tokens.patch_tokens.float(), step.rival.tokens.patch_tokens.float())
