"""PAR on a GPU: its affinity in one kernel, and each of its rounds in one.

Written as tensor operations, a round is 48 kernels which write 48 partial sums, and the affinity some 350; a GPU then
waits for the host that launches them. Here every weight is read once per round and only sums are written. Triton comes
with PyTorch's builds for CUDA; where it is missing, `par` computes as it does on a CPU.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 128
"""Pixels of a block."""
MOST_MASKS = 16
"""Masks of a block: more are shared out among blocks."""


def rounds(weights: Tensor, masks: Tensor, offsets: Tensor, n: int) -> Tensor:
    """`n` rounds of PAR: weights O B H W, masks B C H W, offsets O 2 (dy, dx); float32, all on one GPU."""
    (N, B, H, W), C = weights.shape, masks.shape[1]
    some = min(MOST_MASKS, triton.next_power_of_2(C))
    source, other = masks.contiguous(), None
    for _ in range(n):
        target = torch.empty_like(source) if other is None else other
        grid = (triton.cdiv(H * W, PIXELS), B, triton.cdiv(C, some))
        _round[grid](weights, source, target, offsets, N, B, C, H, W, PIXELS=PIXELS, MASKS=some)
        source, other = target, None if source is masks else source
    return source


def affinity(images: Tensor, offsets: Tensor, position: Tensor, width: float, eps: float) -> Tensor:
    """PAR's weights, O B H W, of images B 3 H W: see `par.affinity`. `position` are the O weights of the distances."""
    B, _, H, W = images.shape
    N = len(offsets)
    weights = images.new_empty(N, B, H, W)
    grid = (triton.cdiv(H * W, PIXELS), B)
    _affinity[grid](images.contiguous(), weights, offsets, position, N, B, H, W, width, eps, PIXELS=PIXELS)
    return weights


@triton.jit
@no_type_check
def _neighbour(offsets, o, y, x, H, W):
    """Where the o-th neighbour of pixels lies; beyond the border is the border."""
    dy, dx = tl.load(offsets + 2 * o), tl.load(offsets + 2 * o + 1)
    y = tl.minimum(tl.maximum(y + dy, 0), H - 1)
    x = tl.minimum(tl.maximum(x + dx, 0), W - 1)
    return y * W + x


@triton.jit
@no_type_check
def _round(weights, masks, out, offsets, N, B, C, H, W, PIXELS: tl.constexpr, MASKS: tl.constexpr):
    """M_i <- sum_j a(i, j) M_j for a block of pixels of one image, and for a block of its masks."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    mask = tl.program_id(2) * MASKS + tl.arange(0, MASKS)
    inside, y, x = pixel < H * W, pixel // W, pixel % W
    both = inside[:, None] & (mask < C)[None, :]
    plane = ((image * C + mask) * H * W)[None, :]
    total = tl.zeros((PIXELS, MASKS), dtype=tl.float32)
    for o in range(N):
        weight = tl.load(weights + (o * B + image) * H * W + pixel, mask=inside, other=0.0)
        near = tl.load(masks + plane + _neighbour(offsets, o, y, x, H, W)[:, None], mask=both, other=0.0)
        total += weight[:, None] * near
    tl.store(out + plane + pixel[:, None], total, mask=both)


@triton.jit
@no_type_check
def _plane(image, channel, H, W, at, inside):
    """A colour channel of an image at some pixels."""
    return tl.load(image + channel * H * W + at, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _scale(image, channel, offsets, y, x, N, H, W, width, eps, inside):
    """1 / (w1 s) of a colour channel, s its standard deviation over the neighbours, in two passes."""
    mean = tl.zeros_like(_plane(image, channel, H, W, y * W + x, inside))
    for o in range(N):
        mean += _plane(image, channel, H, W, _neighbour(offsets, o, y, x, H, W), inside)
    mean = mean / N
    square = tl.zeros_like(mean)
    for o in range(N):
        difference = _plane(image, channel, H, W, _neighbour(offsets, o, y, x, H, W), inside) - mean
        square += difference * difference
    return 1 / (width * (tl.sqrt(square / (N - 1)) + eps))


@triton.jit
@no_type_check
def _square(image, channel, scale, near, at, H, W, inside):
    """(|I_i - I_j| / (w1 s_i))^2 of a colour channel."""
    difference = _plane(image, channel, H, W, near, inside) - _plane(image, channel, H, W, at, inside)
    return difference * scale * difference * scale


@triton.jit
@no_type_check
def _colour(image, red, green, blue, offsets, o, y, x, H, W, inside):
    """k_rgb(i, j) of the o-th neighbours; `red`, `green`, `blue` are the channels' scales."""
    near, at = _neighbour(offsets, o, y, x, H, W), y * W + x
    total = _square(image, 0, red, near, at, H, W, inside) + _square(image, 1, green, near, at, H, W, inside)
    return -(total + _square(image, 2, blue, near, at, H, W, inside)) / 3


@triton.jit
@no_type_check
def _affinity(images, weights, offsets, position, N, B, H, W, width, eps, PIXELS: tl.constexpr):
    """softmax_j k_rgb(i, j) + the weights of the distances, for a block of pixels of one image."""
    number = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside, y, x = pixel < H * W, pixel // W, pixel % W
    image = images + number * 3 * H * W
    red = _scale(image, 0, offsets, y, x, N, H, W, width, eps, inside)
    green = _scale(image, 1, offsets, y, x, N, H, W, width, eps, inside)
    blue = _scale(image, 2, offsets, y, x, N, H, W, width, eps, inside)
    largest = tl.full((PIXELS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    for o in range(N):
        k = _colour(image, red, green, blue, offsets, o, y, x, H, W, inside)
        larger = tl.maximum(largest, k)
        total = total * tl.exp(largest - larger) + tl.exp(k - larger)
        largest = larger
    for o in range(N):
        k = _colour(image, red, green, blue, offsets, o, y, x, H, W, inside)
        weight = tl.exp(k - largest) / total + tl.load(position + o)
        tl.store(weights + (o * B + number) * H * W + pixel, weight, mask=inside)
