"""Reliable: where a label is sure, the decoder's own features are alike in one class and unlike across classes.

After "Escaping the CAM Shadow: Uncertainty-Guided Reliable Learning" (UGRL, AAAI 2026), equations 10 and 11: contrast
among the pixels of an image whose label is least uncertain, by features of the decoder, not by its logits. There the
uncertainty of a pixel is that of its class in the image, measured from prototypes kept over the training; here it is
the token's own distance from the mean token of its label, and nothing is kept. There a projection head of its own makes
the features; here they are what the decoder's last layer reads.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toco_core.conventions import IGNORE

SHARE = 0.5
TEMPERATURE = 0.1
SMALLEST = 1e-6  # length below which a feature has no direction: all ReLUs may be 0


def reliable_label(
    patch_tokens: Float[Tensor, "B N D"], label: Int[Tensor, "B N"], *, share: float = SHARE
) -> Int[Tensor, "B N"]:
    """The label where it is sure: at `share` of an image's tokens of each label, those nearest to their mean; else 255.

    With f the tokens of length 1, S those of one image and one label (0 background, 1..K; 255 is left out) and P their
    mean, the ceil(share |S|) largest f . P stay, at least two; of equal ones those with the lower number. A label that
    one token has alone is left out.
    """
    f = F.normalize(patch_tokens.detach(), dim=-1)
    known = label != IGNORE
    same = (label[:, :, None] == label[:, None, :]) & known[:, None]
    mean = F.normalize(same.to(f.dtype) @ f, dim=-1)  # of each token's own label
    cosine = (f * mean).sum(-1)
    order = cosine.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    before = (same & (order[:, None, :] < order[:, :, None])).sum(2)
    size = same.sum(2)
    kept = (share * size).ceil().clamp(min=2)
    return label.masked_fill(~known | (before >= kept) | (size < 2), IGNORE)


def reliable_loss(
    features: Float[Tensor, "B N F"],
    label: Int[Tensor, "B N"],
    *,
    tau: float = TEMPERATURE,
    tokens: Int[Tensor, "1"] | None = None,
    parts: int = 1,
) -> Float[Tensor, ""]:
    """Supervised contrast of the labelled tokens of each image.

    With g the features of length 1, R the tokens of an image whose label y is not 255, and s(i, j) = g_i . g_j / tau,

        L = - 1/|R| sum over i in R of log (sum over j in R, j != i, y_j = y_i, of exp s(i, j)
                                            / sum over j in R, j != i, of exp s(i, j)),

    |R| over all images; 0 where it is 0, and for a token that has no other of its label. `tau` above 0.

    Where this is one of `parts` equal parts of a batch, `tokens` is |R| of the whole batch, and the mean of the parts'
    results is that of the whole batch.
    """
    g = F.normalize(features, dim=-1, eps=SMALLEST)
    s = g @ g.transpose(1, 2) / tau
    known = label != IGNORE
    others = known[:, :, None] & known[:, None, :]
    others = others & ~torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
    alike = others & (label[:, :, None] == label[:, None, :])
    alone = ~alike.any(2, keepdim=True)  # both sums run over everything there: the logarithm of 1
    above, below = (s.masked_fill(~(pairs | alone), -torch.inf).logsumexp(2) for pairs in (alike, others))
    n = known.sum() if tokens is None else tokens[0]
    return parts * (below - above).sum() / n.clamp(min=1)


def reliable_tokens(step) -> Int[Tensor, "B N"]:
    """Which tokens teach in a step: the pseudo label at their centres, where it is reliable."""
    tokens = step.tokens
    label = F.interpolate(step.pseudo_label[:, None].float(), size=tokens.grid, mode="nearest-exact")
    return reliable_label(tokens.patch_tokens.float(), label.flatten(1).long())


def reliable(step) -> Float[Tensor, ""]:
    """Among the tokens of each main image. The decoder's first two layers are computed once more."""
    label = step.made(reliable_tokens)
    with step.autocast():
        features = step.model.decoder.hidden(step.tokens.patch_map)
    with torch.autocast(step.batch.images.device.type, enabled=False):
        features = features.float().flatten(2).transpose(1, 2)
        return reliable_loss(features, label, tokens=step.count("reliable"), parts=step.parts)
