"""How alike the patch tokens are: the measure of over-smoothing."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .config import TrainConfig
from .data import evaluation_items, to_unit
from .model import ToCo


def token_similarity(patch_tokens: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """Mean cosine similarity over all pairs of different tokens of an image, in [-1, 1]; 1: all tokens point one way.

    The pairs are not formed: the squared length of the sum of the N unit tokens is N plus the sum over ordered pairs.
    An image of one token has no pair: 1.
    """
    N = patch_tokens.shape[1]
    total = F.normalize(patch_tokens.double(), dim=-1).sum(dim=1).square().sum(dim=-1)
    return ((total - N) / max(N * (N - 1), 1) if N > 1 else torch.ones_like(total)).to(patch_tokens.dtype)


@torch.no_grad()
def similarity_by_block(model: ToCo, images: Float[Tensor, "B 3 H W"]) -> list[float]:
    """Mean token similarity after each block, over normalised images; the last block's tokens as the classifier sees
    them, after the final norm."""
    tokens = model.block_tokens(images)
    tokens[-1] = model.encode(images).patch_tokens
    return [float(token_similarity(block).mean()) for block in tokens]


@torch.no_grad()
def similarity_of_split(model: ToCo, source, config: TrainConfig, *, n_images: int = 16) -> list[float]:
    """`similarity_by_block` over the first `n_images` of a split, each at `crop_size` square."""
    items = evaluation_items(source.subset(range(min(n_images, len(source)))), size=config.data.crop_size)
    images = torch.cat([item.image for item in items]).to(model.classifier.weight.device)
    return similarity_by_block(model, model.normalise(to_unit(images)))
