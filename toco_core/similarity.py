"""How alike the patch tokens are: the measure of over-smoothing.

Two views of one thing. Pairs: the cosine similarity of any two tokens (paper, figure 1). Frequencies: self-attention is
a low-pass filter ("Anti-oversmoothing in deep vision transformers", ICLR 2022), so what differs from the mean token,
the energy above frequency 0, fades from block to block. For tokens of length 1 the two say the same:

    mean similarity of pairs = (N (1 - f) - 1) / (N - 1),   f = `high_frequency_energy`
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .config import TrainConfig
from .data import evaluation_items, to_unit
from .errors import ToCoError
from .model import ToCo


def token_similarity(patch_tokens: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """Mean cosine similarity over all pairs of different tokens of an image, in [-1, 1]; 1: all tokens point one way.

    The pairs are not formed: the squared length of the sum of the N unit tokens is N plus the sum over ordered pairs.
    An image of one token has no pair: 1.
    """
    N = patch_tokens.shape[1]
    total = F.normalize(patch_tokens.double(), dim=-1).sum(dim=1).square().sum(dim=-1)
    return ((total - N) / max(N * (N - 1), 1) if N > 1 else torch.ones_like(total)).to(patch_tokens.dtype)


def similarity_matrix(patch_tokens: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B N N"]:
    """Cosine similarity of every token with every token, in [-1, 1] (paper, figure 1)."""
    tokens = F.normalize(patch_tokens, dim=-1)
    return (tokens @ tokens.transpose(-2, -1)).clamp(-1, 1)


def similarity_map(patch_tokens: Float[Tensor, "N D"], patch_index: int) -> Float[Tensor, " N"]:
    """Cosine similarity of one token with every token, in [-1, 1]: a row of `similarity_matrix`.

    Patches count from 0, row by row. Raises ToCoError for a patch that is not there.
    """
    if not 0 <= patch_index < len(patch_tokens):
        raise ToCoError(f"patch = {patch_index} is not allowed: 0..{len(patch_tokens) - 1}, row by row")
    tokens = F.normalize(patch_tokens, dim=-1)
    return (tokens @ tokens[patch_index]).clamp(-1, 1)


def tokens_by_block(model: ToCo, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B N D"]]:
    """Patch tokens after each block, over normalised images; the last block's as the classifier sees them, after the
    final norm."""
    tokens = model.block_tokens(images)
    tokens[-1] = model.encode(images).patch_tokens
    return tokens


@torch.no_grad()
def similarity_by_block(model: ToCo, images: Float[Tensor, "B 3 H W"]) -> list[float]:
    """Mean token similarity after each block, over normalised images; the last block's tokens as the classifier sees
    them, after the final norm."""
    return [float(token_similarity(block).mean()) for block in tokens_by_block(model, images)]


@torch.no_grad()
def similarity_of_split(model: ToCo, source, config: TrainConfig, *, n_images: int = 16) -> list[float]:
    """`similarity_by_block` over the first `n_images` of a split, each at `crop_size` square."""
    items = evaluation_items(source.subset(range(min(n_images, len(source)))), size=config.data.crop_size)
    images = torch.cat([item.image for item in items]).to(model.classifier.weight.device)
    return similarity_by_block(model, model.normalise(to_unit(images)))
