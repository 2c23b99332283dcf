"""What stands on the encoder's tokens: pooling for the classifiers, the projection head, the decoder."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .errors import ToCoError

DILATION = 5  # of the LargeFOV decoder
TOPK_SHARE = 0.2  # of the tokens, averaged by the poolings "topk" and "cam_topk"


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

    def forward(self, patch_map: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C h w"]:
        return self.conv8(F.relu(self.conv7(F.relu(self.conv6(patch_map)))))
