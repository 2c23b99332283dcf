"""Affinity: the encoder's attention learns which patch tokens show the same class.

After "Learning Affinity from Attention" (AFA, Ru et al., CVPR 2022, arXiv 2203.02664), ToCo's predecessor. The
network's `heads.AffinityHead` makes one number of every pair of tokens; here it is taught by the pairs of the pseudo
label. With `attention_kind = "learned"` the CAM is then carried along it (`refiners.attention.walk`): wherever CAMs are
read, and from step `affinity_walk_start` on in the labels that the network learns from.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.labels import affinity_mask, label_at_tokens
from toco_core.lattice import at_least_float32
from toco_core.refiners.attention import RADIUS, near


def affinity_pairs(label: Int[Tensor, "B h w"], *, radius: int = RADIUS) -> Int[Tensor, "B N N"]:
    """Pairs of tokens of a label 0..K, 255 that an affinity learns from: 1 same label (background included), 0
    different; 255 if one is ignored, on the diagonal, and more than `radius` rows or columns apart."""
    grid = (label.shape[1], label.shape[2])
    return affinity_mask(label).masked_fill_(~near(grid, radius, device=label.device), IGNORE)


def count_affinity_pairs(pairs: Int[Tensor, "B N N"]) -> Int[Tensor, "2"]:
    """How many ordered pairs are the same, and how many different."""
    return torch.stack([(pairs == 1).sum(), (pairs == 0).sum()])


def affinity_loss(
    affinity: Float[Tensor, "B N N"],
    pairs: Int[Tensor, "B N N"],
    *,
    counts: Int[Tensor, "2"] | None = None,
    parts: int = 1,
) -> Float[Tensor, ""]:
    """Push the affinity S in [0, 1] of pairs of one class to 1, that of pairs of two classes to 0.

    With R+ the pairs that are 1 and R- those that are 0, of the whole batch,

        L = 1/|R+| sum over R+ of (1 - S_ij)  +  1/|R-| sum over R- of S_ij;   a half without any pair is 0.

    AFA's program halves both and adds 1 to the numbers of pairs. Where this is one of `parts` equal parts of a batch,
    `counts` are |R+| and |R-| of the whole batch, and the mean of the parts' results is that of the whole batch.
    """
    with torch.autocast(affinity.device.type, enabled=False):
        s = at_least_float32(affinity)
        n_same, n_different = (count_affinity_pairs(pairs) if counts is None else counts).clamp(min=1)
        same = ((1 - s) * (pairs == 1)).sum() / n_same
        different = (s * (pairs == 0)).sum() / n_different
        return parts * (same + different)


def token_pairs(step) -> Int[Tensor, "B N N"]:
    """What the affinity learns from in a step: the pairs of its pseudo label, at the tokens."""
    label = label_at_tokens(step.pseudo_label, step.labelled.classes, step.tokens.grid)
    return affinity_pairs(label)


def affinity(step) -> Float[Tensor, ""]:
    """Of the main images; the gradient reaches the head and, through the attention, the encoder. Raises ToCoError
    where the model has no affinity head."""
    if step.tokens.affinity is None:
        raise ToCoError(
            "the term affinity needs an affinity head: `affinity` above 0 in the config that builds the model"
        )
    return affinity_loss(step.tokens.affinity, step.made(token_pairs), counts=step.count("affinity"), parts=step.parts)
