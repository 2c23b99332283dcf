"""How alike the patch tokens are (the measure of over-smoothing), and where the class token looks.

Two views of one thing. Pairs: the cosine similarity of any two tokens (paper, figure 1). Frequencies: self-attention is
a low-pass filter ("Anti-oversmoothing in deep vision transformers", ICLR 2022), so what differs from the mean token,
the energy above frequency 0, fades from block to block. For tokens of length 1 the two say the same:

    mean similarity of pairs = (N (1 - f) - 1) / (N - 1),   f = `high_frequency_energy`

Class token contrast makes the class token of an image and those of its crops alike, and the class token is made of what
it attends to; so the effect of the contrast can be looked for in its attention to the patches, per head and block.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.data import evaluation_items, to_unit
from toco_core.errors import ToCoError
from toco_core.machine.device import in_float64
from toco_core.model import ToCo


def token_similarity(patch_tokens: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """Mean cosine similarity over all pairs of different tokens of an image, in [-1, 1]; 1: all tokens point one way.

    The pairs are not formed: the squared length of the sum of the N unit tokens is N plus the sum over ordered pairs.
    An image of one token has no pair: 1.
    """
    N = patch_tokens.shape[1]
    total = F.normalize(in_float64(patch_tokens), dim=-1).sum(dim=1).square().sum(dim=-1)
    return ((total - N) / max(N * (N - 1), 1) if N > 1 else torch.ones_like(total)).to(patch_tokens)


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
    """Patch tokens after each block, over normalised images, as the two classifiers see them: those of `layer` after
    `aux_norm`, the last block's after the final norm."""
    tokens = model.block_tokens(images)
    last = model.final_norm(tokens[-1])
    tokens[model.layer - 1] = model.aux_norm(tokens[model.layer - 1])
    return [*tokens[:-1], last]


@torch.no_grad()
def similarity_by_block(model: ToCo, images: Float[Tensor, "B 3 H W"]) -> list[float]:
    """Mean token similarity after each block, over normalised images; the last block's tokens as the classifier sees
    them, after the final norm."""
    return [float(token_similarity(block).mean()) for block in tokens_by_block(model, images)]


def similarity_of_split(model: ToCo, source, config: TrainConfig, *, n_images: int = 16) -> list[float]:
    """`similarity_by_block` over the first `n_images` of a split, each at `crop_size` square."""
    return measured_by_block(model, source, config, token_similarity, n_images=n_images).tolist()


@torch.no_grad()
def measured_by_block(
    model: ToCo, source, config: TrainConfig, measure: Callable[[Tensor], Tensor], *, n_images: int = 16
) -> Tensor:
    """Mean over images of what `measure` says about the patch tokens after each block: one row per block.

    measure: B N D tokens -> B values, or B rows of them (`token_similarity`, `high_frequency_energy`, ...).
    The first `n_images` of a split are taken, each at `crop_size` square; tokens as in `tokens_by_block`.
    """
    items = evaluation_items(source.subset(range(min(n_images, len(source)))), size=config.data.crop_size, masks=False)
    images = torch.cat([item.image for item in items]).to(model.classifier.weight.device)
    return torch.stack([measure(t).mean(0) for t in tokens_by_block(model, model.normalise(to_unit(images)))])


def class_token_similarity(
    class_token: Float[Tensor, "B D"], patch_tokens: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N"]:
    """Cosine similarity of the class token with every patch token, in [-1, 1]."""
    return torch.einsum("bd,bnd->bn", F.normalize(class_token, dim=-1), F.normalize(patch_tokens, dim=-1)).clamp(-1, 1)


def high_frequency_energy(patch_tokens: Float[Tensor, "B N D"]) -> Float[Tensor, " B"]:
    """Share of the tokens' energy that is not in their mean, in [0, 1]; 0: all tokens are equal.

        f = ||X - 1 m||^2 / ||X||^2,   X: the N tokens,   m: their mean,   Frobenius norms

    Frequency 0 of the Fourier transform over patches is N m, so by Parseval f is the energy of all other frequencies.
    Tokens that are all 0 give 0.
    """
    tokens = in_float64(patch_tokens)
    high = (tokens - tokens.mean(dim=1, keepdim=True)).square().sum((1, 2))
    return (high / tokens.square().sum((1, 2)).clamp(min=torch.finfo(tokens.dtype).tiny)).to(patch_tokens)


def band_energy(
    patch_tokens: Float[Tensor, "B N D"], grid: tuple[int, int], n_bands: int = 4
) -> Float[Tensor, "B bands"]:
    """Shares of the tokens' energy in bands of spatial frequency: 0 alone, then `n_bands` rings of equal width.

    Energy: squared modulus of the 2-D Fourier transform over the (h, w) patch grid, summed over the D channels. The
    radius of a frequency is in cycles per patch, at most sqrt(1/2) (each axis up to 1/2); each ring holds its outer
    edge. Shares sum to 1, and all but the first to `high_frequency_energy`; tokens that are all 0 give 0. Raises
    ToCoError for a grid of another size.
    """
    h, w = grid
    if h * w != patch_tokens.shape[1]:
        raise ToCoError(f"grid = {h} x {w} is not allowed: there are {patch_tokens.shape[1]} patch tokens")
    tokens = in_float64(patch_tokens).unflatten(1, (h, w))
    energy = torch.fft.fft2(tokens, dim=(1, 2)).abs().square().sum(-1).flatten(1)
    y, x = torch.fft.fftfreq(h, dtype=torch.float64), torch.fft.fftfreq(w, dtype=torch.float64)
    radius = torch.hypot(y[:, None], x[None]).flatten().to(energy.device)
    band = torch.ceil(radius / 0.5**0.5 * n_bands - 1e-9).long()  # 0 only for frequency 0
    shares = energy.new_zeros(len(energy), n_bands + 1).index_add_(1, band, energy)
    return (shares / energy.sum(1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)).to(patch_tokens)


def class_token_attention(model: ToCo, images: Float[Tensor, "B 3 H W"], block: int) -> Float[Tensor, "B heads N"]:
    """Attention probabilities of the class token to the patches in one block (from 1), per head; images are normalised.

    In [0, 1]. They sum to less than 1, since the class token attends to itself and to other prefix tokens, too; N times
    a value tells how many times the attention is that of an even spread. No gradient. Raises ToCoError for a block
    that is not there.
    """
    return class_token_attention_by_block(model, images, blocks=[block])[0]


def class_token_attention_by_block(
    model: ToCo, images: Float[Tensor, "B 3 H W"], *, blocks: Sequence[int] | None = None
) -> list[Float[Tensor, "B heads N"]]:
    """`class_token_attention` of some blocks (None: of all), from one pass."""
    n_prefix = model.encoder.num_prefix_tokens
    return [attention[:, :, 0, n_prefix:] for attention in model.attention(images, blocks=blocks)]
