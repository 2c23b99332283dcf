"""CAM refined by the encoder's own attention.

Self-attention says which tokens go together, and a CAM that fires on a head alone can be carried to the body along it
(AFA, Ru et al., CVPR 2022, with a learned affinity; MCTformer, Xu et al., CVPR 2022, with the attention itself; here
nothing is learned). With A the attention between patch tokens, averaged over heads and over some late blocks, and M
the class activations at the tokens, negative values cut off and each map divided by its maximum,

    M <- M P^T,   P = S / (row sums of S),   `steps` times,

where S is one of two affinities:

    "attention"   S = A + A^T
    "pattern"     S_ij = cos(A_i, A_j) of rows i and j: two tokens go together where they attend to the same tokens

Tokens of some small backbones attend to what they are not (body to background): there an odd power of A carries objects
onto the background, and only "pattern", which has no sign, is safe.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toco_core.errors import refuse_other
from toco_core.par import full_precision

KINDS = ("attention", "pattern")
EPSILON = 1e-5  # added to a map's maximum: a map without any activation stays 0


def token_affinity(attention: Float[Tensor, "B N N"], kind: str = "attention") -> Float[Tensor, "B N N"]:
    """Turn mean attention between patch tokens into an affinity whose rows sum to 1. No gradient.

    Raises ToCoError for another kind.
    """
    refuse_other(KINDS, attention_kind=kind)
    with torch.autocast(attention.device.type, enabled=False):
        a = full_precision(attention.detach())
        if kind == "pattern":
            rows = F.normalize(a, dim=-1)
            s = rows @ rows.transpose(1, 2)
        else:
            s = a + a.transpose(1, 2)
        return s / s.sum(-1, keepdim=True)


def carried(
    activation: Float[Tensor, "B K h w"], affinity: Float[Tensor, "B N N"], steps: int
) -> Float[Tensor, "B K h w"]:
    """Carry class activations at the tokens along the affinity, `steps` times; maps in [0, 1], N = h * w."""
    with torch.autocast(activation.device.type, enabled=False):
        maps = full_precision(activation.detach()).relu()
        maps = (maps / (maps.amax((-2, -1), keepdim=True) + EPSILON)).flatten(2)
        for _ in range(steps):
            maps = maps @ affinity.transpose(1, 2)
        return maps.unflatten(2, activation.shape[2:])


def mean_attention(maps: Sequence[Float[Tensor, "B heads T T"]], n_prefix: int) -> Float[Tensor, "B N N"]:
    """Average attention probabilities over heads and blocks; patch tokens only (rows then sum to at most 1)."""
    mean: Any = sum(full_precision(attention.detach()).mean(1) for attention in maps) / len(maps)
    return mean[:, n_prefix:, n_prefix:]


@contextlib.contextmanager
def plain_attention(attentions: Sequence[Any], *, fused_without_gradient: bool = False) -> Iterator[None]:
    """Within this context timm's attention modules compute by matrix products and a softmax (see
    `ToCo.plain_attention`)."""

    def choose(attention: Any, _) -> None:
        attention.fused_attn = fused_without_gradient and not torch.is_grad_enabled()

    before = [attention.fused_attn for attention in attentions]
    hooks = [attention.register_forward_pre_hook(choose) for attention in attentions]
    try:
        yield
    finally:
        for attention, fused, hook in zip(attentions, before, hooks, strict=True):
            hook.remove()
            attention.fused_attn = fused
