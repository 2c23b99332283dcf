"""What the encoder says of a batch, and what stands on it: pooling for the classifiers, projection head, decoder,
affinity head."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .errors import ToCoError

DILATION = 5  # of the LargeFOV decoder
TOPK_SHARE = 0.2  # of the tokens, averaged by the poolings "topk" and "cam_topk"


class Tokens(NamedTuple):
    """What the encoder says about a batch. `h w` is the patch grid, N = h * w, row by row."""

    class_token: Float[Tensor, "B D"]
    """After the final norm."""
    patch_tokens: Float[Tensor, "B N D"]
    """After the final norm."""
    aux_patch_tokens: Float[Tensor, "B N D"]
    """Of block `layer`, through `ToCo.aux_norm`."""
    grid: tuple[int, int]
    """(h, w)."""
    attention: Float[Tensor, "B N N"] | None = None
    """Between patch tokens, mean over heads and the blocks that `encode` was asked for; no gradient."""
    class_tokens: Float[Tensor, "B K D"] | None = None
    """One per class, after the final norm, where `encode` was asked for `classes`."""
    class_attention: Float[Tensor, "B K N"] | None = None
    """Of these to the patches, mean over heads and all blocks that they go through; no gradient."""
    affinity: Float[Tensor, "B N N"] | None = None
    """What the model's `AffinityHead` makes of the attention of the blocks that `encode` was asked for, where it has
    one that reads them."""

    def part(self, images: slice) -> "Tokens":
        """Those of some images of the batch."""
        own = (self.class_token[images], self.patch_tokens[images], self.aux_patch_tokens[images])
        more = (self.attention, self.class_tokens, self.class_attention, self.affinity)
        return Tokens(*own, self.grid, *(None if value is None else value[images] for value in more))

    @property
    def patch_map(self) -> Float[Tensor, "B D h w"]:
        return self.patch_tokens.transpose(1, 2).unflatten(2, self.grid)

    @property
    def aux_patch_map(self) -> Float[Tensor, "B D h w"]:
        return self.aux_patch_tokens.transpose(1, 2).unflatten(2, self.grid)


class Output(NamedTuple):
    """Heads applied to the tokens of a batch. C = K + 1, background first."""

    class_logits: Float[Tensor, "B K"]
    aux_class_logits: Float[Tensor, "B K"]
    seg_logits: Float[Tensor, "B C h w"] | None
    tokens: Tokens


class BlockTokens(NamedTuple):
    """The patch tokens after every block, to look at."""

    blocks: list[Float[Tensor, "B N D"]]
    """As each block leaves them."""
    normed: list[Float[Tensor, "B N D"]]
    """The same through the final norm, as the classifier would see them were the block the last one."""
    tokens: Tokens
    """What `encode` gives."""

    def images(self) -> "list[BlockTokens]":
        """Each image of the batch by itself."""
        return [
            BlockTokens([x[one] for x in self.blocks], [x[one] for x in self.normed], self.tokens.part(one))
            for one in (slice(b, b + 1) for b in range(len(self.tokens.class_token)))
        ]


@runtime_checkable
class Kept(Protocol):
    """What has the tokens of the first blocks at hand (see `train.kept_tokens`)."""

    blocks: int

    def serves(self, layer: int, attended: Iterable[int]) -> bool:
        """Whether the tokens after block `layer` and the attention inside the others lie behind the kept ones."""

    def tokens(self, model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """All tokens after the kept blocks, B T D, and the grid."""


def pooled(patch_tokens: Float[Tensor, "B N D"], pooling: str) -> Float[Tensor, "B D"]:
    """All patch tokens as one vector, each channel d on its own: what a classifier reads.

    With x_(1) >= ... >= x_(N) the values of a channel over the tokens, sorted, it is the mean of the k largest,
    (x_(1) + ... + x_(k)) / k: k = 1 for `max` (the published pooling), k = N for `mean`, and a fifth of the tokens for
    `topk`, k = ceil(N / 5). So all three differ in k only; the classifier comes afterwards and its weights make CAM in
    the same way. The mean commutes with the classifier: global average pooling of CAM.

    Errors: `ToCoError` for another name.
    """
    if pooling == "max":
        return patch_tokens.max(dim=1).values
    if pooling == "mean":
        return patch_tokens.mean(dim=1)
    if pooling == "topk":
        return _top(patch_tokens)
    raise ToCoError(f"pooling = {pooling!r} is not allowed: one of max, mean, topk")


def class_scores(
    patch_tokens: Float[Tensor, "B N D"], classifier: Callable[[Tensor], Tensor], pooling: str
) -> Float[Tensor, "B K"]:
    """Class logits of patch tokens: a linear classifier of what is `pooled`, or for `cam_topk` the mean of the largest
    fifth, ceil(N / 5), of the scores that it gives the tokens themselves.

    A vector of channels' maxima belongs to no place, and a class can be told by a sum of surroundings that no token
    shows. With `cam_topk` a logit is a mean of values of the raw CAM: the places which speak for a class are those that
    are trained.
    """
    if pooling == "cam_topk":
        return _top(classifier(patch_tokens))
    return classifier(pooled(patch_tokens, pooling))


def _top(values: Float[Tensor, "B N F"]) -> Float[Tensor, "B F"]:
    """The mean of the largest fifth over the tokens."""
    return values.topk(math.ceil(TOPK_SHARE * values.shape[1]), dim=1).values.mean(dim=1)


class ProjectionHead(nn.Module):
    """D -> P: three linear layers with GELU between them, L2 normalisation, and a weight-normalised linear layer
    without bias.

    The rows of the last layer are directions `weight_v` of length `weight_g`, which stays 1 and is not trained.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, out: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class WeightNormLinear(nn.Module):
    """Linear layer whose weight rows are weight_g * weight_v / |weight_v|."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.Linear(width, out, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class LargeFOV(nn.Module):
    """Segmentation decoder: two 3 x 3 convolutions with a dilation (5 as published) and ReLU, then one 1 x 1; no
    biases. Output at the patch grid."""

    def __init__(self, width: int, hidden: int, out: int, *, dilation: int = DILATION):
        super().__init__()
        self.conv6 = nn.Conv2d(width, hidden, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(hidden, out, 1, bias=False)

    def hidden(self, patch_map: Float[Tensor, "B D h w"]) -> Float[Tensor, "B F h w"]:
        """What the last layer reads, at least 0."""
        return F.relu(self.conv7(F.relu(self.conv6(patch_map))))

    def forward(self, patch_map: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C h w"]:
        return self.conv8(self.hidden(patch_map))


class AffinityHead(nn.Module):
    """How likely two patch tokens are to show the same class, read from the encoder's attention.

    "Learning Affinity from Attention" (AFA, Ru et al., CVPR 2022): one linear layer over all heads of some blocks, and
    a sigmoid. With A_mh the attention of head h in block m between the N patch tokens,

        S = sigmoid(Z + Z^T + b),    Z = N sum over m, h of w_mh A_mh

    Attention counts in multiples of 1 / N, what each token would get were all alike: the same weights then serve grids
    of every size, and learn at the rate of other heads. Weights and bias begin at 0, so that no pair is preferred and
    no gradient enters the attention before something is learned.
    """

    def __init__(self, blocks: Iterable[int], heads: int):
        super().__init__()
        self.blocks = tuple(sorted(set(blocks)))
        self.weight = nn.Parameter(torch.zeros(len(self.blocks), heads))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Sequence[Float[Tensor, "B heads T T"]], n_prefix: int) -> Float[Tensor, "B N N"]:
        """S of attention probabilities, block after block; the first `n_prefix` of the T tokens are no patches."""
        with torch.autocast(maps[0].device.type, enabled=False):
            z: Any = 0
            for attention, weight in zip(maps, self.weight, strict=True):
                patches = attention[:, :, n_prefix:, n_prefix:].to(weight.dtype)
                z = z + torch.einsum("bhij,h->bij", patches, weight)
            z = z * z.shape[-1]
            return (z + z.transpose(1, 2) + self.bias).sigmoid()
