"""Frequency: the final patch tokens keep the fine detail that those of block `layer` have.

After "FFR: Frequency Feature Rectification" (CVPR 2025), which holds that a vision transformer damps high frequencies
and that its decoder therefore segments too smoothly. FFR mends what the decoder makes of them; here the tokens
themselves shall not lose them. It asks of tokens what patch token contrast asks of pairs, without any label: a run with
`frequency` in place of `ptc` tells how much of PTC is its labels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CUTOFF = 0.125  # cycles per patch: what repeats within 8 patches is detail


def detail_share(
    patch_tokens: Float[Tensor, "B N D"], grid: tuple[int, int], *, cutoff: float = CUTOFF
) -> Float[Tensor, " B"]:
    """Share of the tokens' energy, in [0, 1], at frequencies of more than `cutoff` cycles per patch.

    With f the tokens of length 1 on their grid of h x w, and X their Fourier transform, channel by channel,

        R = sum of |X(u, v)|^2 over (u, v) with (u/h)^2 + (v/w)^2 > cutoff^2,  over the sum of all;

    u and v count from the middle: at most half of h and of w. Below the cutoff lie their mean, whose share is the mean
    cosine of all pairs (a token with itself among them), and what only changes slowly.
    """
    h, w = grid
    tokens = F.normalize(patch_tokens, dim=-1).unflatten(1, grid)
    energy = torch.view_as_real(torch.fft.fft2(tokens, dim=(1, 2))).square().sum((-2, -1))
    y, x = (torch.fft.fftfreq(n, dtype=energy.dtype, device=energy.device) for n in (h, w))
    high = y[:, None].square() + x.square() > cutoff**2
    return (energy * high).sum((1, 2)) / energy.sum((1, 2)).clamp(min=torch.finfo(energy.dtype).tiny)


def frequency_loss(
    patch_tokens: Float[Tensor, "B N D"], aux_patch_tokens: Float[Tensor, "B N D"], grid: tuple[int, int]
) -> Float[Tensor, ""]:
    """What part of the detail of block `layer` the final tokens lack, in [0, 1]; more than that costs nothing.

    With R the `detail_share` of the final tokens and R_m that of block `layer`, which has no gradient,

        L = 1/B sum over images of max(0, R_m - R) / R_m;   0 for an image whose R_m is 0.
    """
    share = detail_share(patch_tokens, grid)
    target = detail_share(aux_patch_tokens.detach(), grid)
    return (F.relu(target - share) / target.clamp(min=torch.finfo(target.dtype).tiny)).mean()


def frequency(step) -> Float[Tensor, ""]:
    """Of the main images, padding included."""
    tokens = step.tokens
    with torch.autocast(step.batch.images.device.type, enabled=False):
        return frequency_loss(tokens.patch_tokens.float(), tokens.aux_patch_tokens.float(), tokens.grid)
