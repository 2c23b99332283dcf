"""The losses: classification, patch token contrast, class token contrast, segmentation, dense energy.

Every function is pure, returns one number to be weighted and summed, computes in float32 even inside autocast (float64
stays float64), and waits for no device (the dense energy: only where its lattices are not made before).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from toco_core.lattice import Lattice, at_least_float32, energy_lattices, nearest_pixels, scaled_size

from .conventions import IGNORE
from .errors import ToCoError
from .labels import inside_box

ENERGY_WEIGHT = 1e-7  # of the dense energy, as published
COSINE_EPSILON = 1e-8  # a token shorter than this is divided by it: a zero token has cosine 0 with everything
PAIR_EPSILON = 1.0  # added to the number of pairs in PTC; the release's value, it makes the mean of few pairs smaller
EXP_EPSILON = 1e-4  # added to the denominator of InfoNCE; keeps the gradient of an image without negatives near 0
POSITIVE_EPSILON = 1e-4  # added to the number of positive views in CTC

PTC_ROWS = 128  # rows of the N x N similarity that PTC holds at a time on a CPU: they stay in its cache
PTC_ENTRIES = 2**26  # entries of B similarities that it holds at a time on other devices, which want few large pieces


def classification_loss(logits: Float[Tensor, "B K"], image_labels: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
    """Multi-label soft margin loss: binary cross-entropy of every class, mean over classes and images.

    `image_labels` in {0, 1}, foreground classes only, on any device. Used for the classifier and for the auxiliary
    classifier alike.
    """
    with _full_precision(logits):
        logits = at_least_float32(logits)
        return F.binary_cross_entropy_with_logits(logits, image_labels.to(logits, non_blocking=True))


def ptc_loss(
    patch_map: Float[Tensor, "B D h w"],
    label: Integer[Tensor, "B h w"],
    *,
    keep_constant: bool = False,
    pairs: Int[Tensor, "2"] | None = None,
    parts: int = 1,
) -> Float[Tensor, ""]:
    """Patch token contrast (PTC): tokens of one class shall be alike, tokens of different classes shall not.

        1/2 (1 - mean over same pairs |cos|) + 1/2 mean over different pairs |cos|,    mean = sum / (pairs + 1)

    `patch_map` are the tokens of the last block; `label`, at their scale, is the thresholded auxiliary CAM and says
    what each token shows (0 background, 1..K). Pairs are ordered pairs of two distinct tokens of one image, the means
    run over the pairs of the whole batch, and a pair with a token labelled 255 counts nowhere. With the
    absolute value, which is the release's, opposite tokens are as "alike" as equal ones.

    Memory is linear in N: pairs are counted in closed form from the class sizes, and the similarities are visited a
    block of rows at a time with the gradient taken on the way. Differentiable once.

    A half without any pair is 0. The release leaves the constant 1/2 of the same-class half there, with the same
    gradient; `keep_constant` brings it back.

    Where this is one of `parts` equal parts of a batch, `pairs` are those of the whole batch (the sum of `count_pairs`
    over the parts), and the mean of the parts' results, and of their gradients, is that of the whole batch.
    """
    if label.shape[-2:] != patch_map.shape[-2:]:
        raise ToCoError(
            f"label has the grid {tuple(label.shape[-2:])}: allowed is that of patch_map, {tuple(patch_map.shape[-2:])}"
        )
    with _full_precision(patch_map):
        tokens = at_least_float32(patch_map).flatten(2).transpose(1, 2)  # B N D
        tokens = F.normalize(tokens, dim=2, eps=COSINE_EPSILON)
        label = label.flatten(1).long()
        same_pairs, different_pairs = _count_pairs(label) if pairs is None else pairs

        valid = label != IGNORE
        tokens = tokens * valid[..., None]  # an ignored token has similarity 0 with everything, hence no gradient
        same_weight = -0.5 / (same_pairs.to(tokens.dtype) + PAIR_EPSILON)
        different_weight = 0.5 / (different_pairs.to(tokens.dtype) + PAIR_EPSILON)
        similarity = _WeightedSimilarity.apply(tokens, label, same_weight, different_weight)
        constant = torch.full_like(similarity, 0.5) if keep_constant else 0.5 * (same_pairs > 0)
        return constant + parts * similarity


def ctc_loss(
    student: Float[Tensor, "B V P"],
    teacher: Float[Tensor, "B G P"],
    is_positive: Bool[Tensor, "B V"],
    *,
    temperature: float = 0.5,
    negatives_only_term: bool = True,
    cosine: bool = False,
    unrelated: Bool[Tensor, "B B"] | None = None,
) -> Float[Tensor, ""]:
    """Class token contrast (CTC): views of foreground approach the global view, views of background leave it.

    `student` are the projected class tokens of all views (the global ones first), `teacher` those of the G = 2 global
    views through the averaged head, of any length, as in the release. `is_positive` is true where a view shows the
    image's objects, as the global views always do. With p = exp(student . teacher / temperature) and n the sum of p
    over an image's negative views, an image costs

        sum over positive views of -log(p / (p + n + 1e-4))  +  log(1 + n + 1e-4)

    divided by (positive views + 1e-4); the result is the mean over teacher views and images. No gradient reaches the
    teacher.

    The second term is no part of InfoNCE: the release adds it once per image, and an image without positive local views
    learns from it too. The published weight of CTC was chosen with it; `negatives_only_term=False` leaves it out. An
    image without any positive view, which the release never meets and would multiply by 1e4, costs 0.

    Two variants, neither of them the paper's, in the same equation:

    - `cosine`: p = exp(cos(student, teacher) / temperature), with a vector shorter than 1e-8 at cosine 0.
    - `unrelated`, true at [i, j] where image j shares nothing with image i (never at [i, i]): n of image i and a
      teacher view is the sum of p over its own negative views and over **all** views of its unrelated images,
      n = sum over v of image i, negative, of p(i, v)  +  sum over j unrelated to i, all v, of p(j, v).
    """
    if temperature <= 0:
        raise ToCoError(f"temperature = {temperature}: allowed are numbers above 0")
    with _full_precision(student):
        student = at_least_float32(student)
        teacher = teacher.detach().to(student.dtype)
        if cosine:
            student, teacher = (F.normalize(views, dim=2, eps=COSINE_EPSILON) for views in (student, teacher))
        logits = student @ teacher.transpose(1, 2) / temperature  # B V G
        positive = is_positive[..., None]

        # log(n + epsilon), per teacher view, without leaving the range of float32
        epsilon = torch.full_like(logits[:, :1], math.log(EXP_EPSILON))
        against = [logits.masked_fill(positive, -torch.inf), epsilon]
        if unrelated is not None:
            others = torch.einsum("jvp,igp->ijvg", student, teacher) / temperature
            against.append(others.masked_fill(~unrelated[:, :, None, None], -torch.inf).flatten(1, 2))
        negatives = torch.cat(against, dim=1).logsumexp(dim=1, keepdim=True)

        cost = (F.softplus(negatives - logits) * positive).sum(dim=1)  # B G
        if negatives_only_term:
            cost = cost + F.softplus(negatives.squeeze(1))
        positives = is_positive.sum(dim=1, keepdim=True, dtype=student.dtype)
        return (cost * (positives > 0) / (positives + POSITIVE_EPSILON)).mean()


def segmentation_loss(
    logits: Float[Tensor, "B C H W"],
    label: Integer[Tensor, "B H W"],
    *,
    nan_when_empty: bool = False,
    pixels: Int[Tensor, "2"] | None = None,
    parts: int = 1,
) -> Float[Tensor, ""]:
    """Cross-entropy in balance: half the mean over the background's pixels, half the mean over those of 1..K.

    255 is ignored. A half without pixels is 0 and has gradient 0, so a label without a valid pixel costs 0. In the
    release it is NaN, and NaN times weight 0 is NaN: one such batch in the warm-up ends the training. `nan_when_empty`
    does the same.

    Where this is one of `parts` equal parts of a batch, `pixels` are those of the whole batch (the sum of
    `count_pixels` over the parts), and the mean of the parts' results is that of the whole batch.
    """
    if label.shape[-2:] != logits.shape[-2:]:
        raise ToCoError(
            f"label has the size {tuple(label.shape[-2:])}: allowed is that of the logits, {tuple(logits.shape[-2:])}"
        )
    with _full_precision(logits):
        label = label.long()
        cost = F.cross_entropy(at_least_float32(logits), label, ignore_index=IGNORE, reduction="none")
        counts = (count_pixels(label) if pixels is None else pixels).clamp(min=0 if nan_when_empty else 1)
        means = [(cost * half).sum() / n for half, n in zip(_halves(label), counts, strict=True)]
        return parts * 0.5 * (means[0] + means[1])


def count_pairs(label: Integer[Tensor, "B h w"]) -> Int[Tensor, "2"]:
    """Pairs of tokens that `ptc_loss` takes its means over: of the same class, of different classes."""
    return torch.stack(_count_pairs(label.flatten(1).long()))


def count_pixels(label: Integer[Tensor, "B H W"]) -> Int[Tensor, "2"]:
    """Pixels that `segmentation_loss` takes its means over: background, foreground."""
    return torch.stack([half.sum() for half in _halves(label)])


def count_known(label: Integer[Tensor, " ..."]) -> Int[Tensor, "1"]:
    """Entries of a label that are not 255: what a plain mean runs over."""
    return (label != IGNORE).sum()[None]


def _halves(label: Integer[Tensor, "B H W"]) -> tuple[Bool[Tensor, "B H W"], Bool[Tensor, "B H W"]]:
    """Which pixels are background, which foreground; ignored ones are neither."""
    return label == 0, (label != 0) & (label != IGNORE)


class _WeightedSimilarity(torch.autograd.Function):
    """Sum over pairs i != j of weight_ij |t_i . t_j|, one weight where labels agree and one where they differ.

    Ignored tokens must be 0.

    The gradient is a by-product of the blocks of the forward pass, so it is computed there: nothing of size N x N is
    kept or redone.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, label: Tensor, same_weight: Tensor, different_weight: Tensor) -> Tensor:
        total = tokens.new_zeros(())
        gradient = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        columns = tokens.transpose(1, 2)
        B, N, _ = tokens.shape
        step = PTC_ROWS if tokens.device.type == "cpu" else max(PTC_ROWS, PTC_ENTRIES // (B * N))
        for start in range(0, N, step):
            rows = slice(start, start + step)
            similarity = tokens[:, rows] @ columns  # B rows N
            weight = torch.where(label[:, rows, None] == label[:, None, :], same_weight, different_weight)
            weight.diagonal(offset=start, dim1=1, dim2=2).zero_()  # a token makes no pair with itself
            weight *= similarity.sign()
            total += (weight * similarity).sum()
            if gradient is not None:
                gradient[:, rows] = weight @ tokens
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(2))  # each token is row and column
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None


def _count_pairs(label: Int[Tensor, "B N"]) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """Ordered pairs of distinct valid tokens of one image: of the same class, of different classes."""
    sizes = torch.zeros(label.shape[0], IGNORE + 1, dtype=torch.long, device=label.device)
    sizes.scatter_add_(1, label, torch.ones_like(label))
    sizes = sizes[:, :IGNORE]
    valid, squares = sizes.sum(dim=1), sizes.square().sum(dim=1)
    return (squares - valid).sum(), (valid.square() - squares).sum()


def _full_precision(x: Tensor):
    """A context in which autocast does not lower what is computed on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def dense_energy_loss(
    logits: Float[Tensor, "B C H W"],
    images: Float[Tensor, "B 3 H W"],
    label: Integer[Tensor, "B H W"],
    valid_box: Integer[Tensor, "B 4"] | None = None,
    *,
    weight: float = ENERGY_WEIGHT,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
    scale: float = 0.5,
    lattices: Sequence[Lattice] | None = None,
) -> Float[Tensor, ""]:
    """Dense energy of the regularised losses (Tang et al., ECCV 2018): like pixels shall get like labels.

    With S the class probabilities inside `valid_box` (top, bottom, left, right; the whole image if None), W the
    bilateral filter of the image and g a gate per pixel, all at `scale` times the size,

        -weight / B * sum over classes of S^T diag(g) W S

    `g` is 1 where `label` is 255; elsewhere 1 - the pixel's largest probability, so that what is labelled and learnt is
    left alone. It counts as a constant. Probabilities are reduced bilinearly, images and labels to the nearest pixel,
    sizes rounded down.

    Images in [0, 1]. Computed in float32 (float64 logits: float64). `lattices` as made by `energy_lattices` with the
    same settings saves half of the time; without, they are built here, which waits for the device.

    As in the release the gradient with respect to S is -2 weight / B * g W S, as if diag(g) W were symmetric. It is
    not: g differs between pixels, and the lattice blurs axis after axis, which is noticeable on images of a few pixels.
    The published weights were chosen with it.
    """
    B, _, H, W = logits.shape
    if images.shape[-2:] != (H, W) or label.shape[-2:] != (H, W):
        raise ToCoError(
            f"images {tuple(images.shape[-2:])} and label {tuple(label.shape[-2:])}: "
            f"allowed is the size of the logits, {(H, W)}"
        )
    if lattices is None:
        lattices = energy_lattices(images, sigma_rgb=sigma_rgb, sigma_xy=sigma_xy, scale=scale)
    if len(lattices) not in (1, B):
        raise ToCoError(f"lattices has {len(lattices)} entries: allowed is one per image, {B}, or one of all")

    with torch.autocast(logits.device.type, enabled=False):
        probs = at_least_float32(logits).softmax(dim=1)
        size = scaled_size(logits, scale)
        probs = F.interpolate(probs, size=size, mode="bilinear", align_corners=False)
        rows, columns = nearest_pixels(logits, size)
        ignored = (label == IGNORE)[:, None, rows[:, None], columns]
        inside = torch.ones_like(probs[:, :1])
        if valid_box is not None:
            inside *= inside_box(valid_box.to(rows.device), (H, W))[:, None, rows[:, None], columns]

        segments = probs * inside
        with torch.no_grad():
            gate = (inside - probs.amax(dim=1, keepdim=True)).clamp(min=0).masked_fill(ignored, 1)
            points = segments.movedim(1, -1).reshape(len(lattices), -1, segments.shape[1])
            filtered = torch.cat([lattice.filter(part) for lattice, part in zip(lattices, points, strict=True)])
            filtered = filtered.unflatten(0, (B, *size)).movedim(-1, 1).contiguous().to(probs.dtype)
        twice = -2 * weight / B * (segments * (gate * filtered)).sum()
        return twice - 0.5 * twice.detach()  # the energy, with the gradient of twice the energy
