"""CAM refined by the encoder's own attention.

Self-attention says which tokens go together, and a CAM that fires on a head alone can be carried to the body along it
(AFA, Ru et al., CVPR 2022, with a learned affinity; MCTformer, Xu et al., CVPR 2022, with the attention itself). With A
the attention between patch tokens, averaged over heads and over some late blocks, and M the class activations at the
tokens, negative values cut off and each map divided by its maximum,

    M <- M P^T,   P = S / (row sums of S),   `steps` times,

where S is one of three affinities:

    "attention"   S = A + A^T
    "pattern"     S_ij = cos(A_i, A_j) of rows i and j: two tokens go together where they attend to the same tokens
    "learned"     S_ij^2 of the model's `heads.AffinityHead` where i and j are at most 8 rows and 8 columns apart, else
                  0; S_ii = 1

Tokens of some small backbones attend to what they are not (body to background): there an odd power of A carries objects
onto the background. "pattern" has no sign and is safe there; "learned" can give a head a negative weight, and so turn
what it says around.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from toco_core.errors import ToCoError, refuse_other
from toco_core.heads import Tokens
from toco_core.par import full_precision

FIXED = ("attention", "pattern")
KINDS = (*FIXED, "learned")
RADIUS = 8  # tokens: how far a learned affinity is taught and carries; AFA's value
POWER = 2  # of a learned affinity in the walk, which makes small ones smaller; AFA's value
EPSILON = 1e-5  # added to a map's maximum: a map without any activation stays 0


def walk(tokens: Tokens, kind: str) -> Float[Tensor, "B N N"]:
    """Choose P, along which CAMs of a pass are carried; rows sum to 1, no gradient.

    Raises ToCoError for another kind, and for "learned" where the tokens carry no affinity.
    """
    refuse_other(KINDS, attention_kind=kind)
    if kind != "learned":
        assert tokens.attention is not None
        return token_affinity(tokens.attention, kind)
    if tokens.affinity is None:
        raise ToCoError(
            "attention_kind = 'learned' is not allowed: this model has no affinity head for these attention_blocks "
            "(it is trained with them and with affinity above 0)"
        )
    return learned_walk(tokens.affinity, tokens.grid)


def learned_walk(affinity: Float[Tensor, "B N N"], grid: tuple[int, int]) -> Float[Tensor, "B N N"]:
    """P of an `AffinityHead`'s S in [0, 1], N = h * w: AFA's D^-1 S^2 within its window. No gradient.

    AFA takes S_ii as it is learned; here it is 1, so that no row is empty.
    """
    with torch.autocast(affinity.device.type, enabled=False):
        s = full_precision(affinity.detach()) ** POWER * near(grid, device=affinity.device)
        s.diagonal(dim1=1, dim2=2).fill_(1)
        return s / s.sum(-1, keepdim=True)


def near(grid: tuple[int, int], radius: int = RADIUS, *, device: torch.device | None = None) -> Bool[Tensor, "N N"]:
    """Whether two tokens of a grid (h, w) are at most `radius` rows and `radius` columns apart."""
    y, x = (torch.arange(n, device=device) for n in grid)
    rows, columns = ((place[:, None] - place).abs() <= radius for place in (y, x))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def token_affinity(attention: Float[Tensor, "B N N"], kind: str = "attention") -> Float[Tensor, "B N N"]:
    """Turn mean attention between patch tokens into an affinity whose rows sum to 1. No gradient.

    Raises ToCoError for another kind than "attention" and "pattern".
    """
    refuse_other(FIXED, attention_kind=kind)
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


@contextlib.contextmanager
def attention_maps(attentions: Sequence[Any], blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Yield a list to which every pass within this context appends the attention probabilities of some blocks, from 1;
    `attentions` are timm's modules of all blocks. They then compute by matrix products, unless no block is named."""
    maps: list[Tensor] = []
    wanted = set(blocks)
    with contextlib.ExitStack() as stack:
        if wanted:
            stack.enter_context(plain_attention(attentions))
        for number in wanted:
            dropout = attentions[number - 1].attn_drop
            stack.callback(dropout.register_forward_pre_hook(lambda _, args: maps.append(args[0])).remove)
        yield maps
