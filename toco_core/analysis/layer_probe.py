"""CAM of every block: how well do the tokens of a block tell where an object is?

Only block `layer` and the last one have classifiers. For any other block one is fitted afterwards, on frozen tokens and
the same image-level labels: a bias-free linear function of the pooled patch tokens (their maximum, unless the model has
another `aux_pooling`), which is the auxiliary classifier's form. Since the tokens are frozen, what is pooled is a
constant per image and fitting is a logistic regression with one solution; no seed, no schedule. (With the pooling
`cam_topk`, where it is no constant, the probe is fitted as a warm start is.) Such a probe says what could be read from
a block, not what the network itself reads there.

(Applying the final norm and classifier to an early block instead would assume that all blocks speak the last one's
language; a poor map would then say nothing about the block.)

Everything here is at one scale, not mirrored: differences between blocks are wanted, not the best map.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toco_core.cam import class_activation, normalise_cam
from toco_core.config import TrainConfig
from toco_core.data import EvalItem, evaluation_items, to_unit
from toco_core.data.loader import in_batches
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import CAMCounts, strongest
from toco_core.machine.device import in_float64
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.model import ToCo
from toco_core.predict.tokens import tokens_by_block
from toco_core.train.warm_start import classifier_input, fit_classifier

BATCH = 16  # images whose tokens of all blocks are held at a time
PROBE_STEPS = 300  # of a probe of the scores at tokens


def token_cam(
    patch_tokens: Float[Tensor, "B N D"], weight: Float[Tensor, "K D"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "B K H W"]:
    """CAM in [0, 1] of any tokens and classifier: applied at every token, resized bilinearly to `size`, cut off at 0,
    brought to [0, 1]. Of the network's own tokens and classifiers it equals `multi_scale_cam` at scale 1, not mirrored.
    """
    raw = class_activation(patch_tokens.transpose(1, 2).unflatten(2, grid), weight)
    raw = F.interpolate(raw, size=size, mode="bilinear", align_corners=False).relu()
    return normalise_cam(raw.flatten(0, 1)).unflatten(0, raw.shape[:2])


def own_classifiers(model: ToCo) -> dict[int, Tensor]:
    """Block (from 1) -> weight of the classifier that was trained on its tokens: `layer`'s and the last block's."""
    return {model.layer: model.aux_classifier.weight.detach()} | {model.depth: model.classifier.weight.detach()}


def fitted_classifier(
    features: Float[Tensor, "M D"], image_labels: Float[Tensor, "M K"], *, decay: float = 0.01
) -> Float[Tensor, "K D"]:
    """The bias-free linear classifier W with the smallest multi-label soft margin loss plus decay / 2 ||W S||^2.

    S is the diagonal of the features' standard deviations, so that the result does not depend on their units. The
    problem is strictly convex: one solution, found by L-BFGS in float64. Raises ToCoError for `decay` not above 0.
    """
    if not decay > 0:
        raise ToCoError(f"decay = {decay} is not allowed: above 0, or classes that can be separated have no solution")
    x, y = in_float64(features.detach()), in_float64(image_labels)
    spread = x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-6 * x.abs().max().clamp(min=1e-30))
    with torch.enable_grad():
        weight = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        search = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def cost():
            search.zero_grad()
            loss = F.multilabel_soft_margin_loss(x / spread @ weight.T, y) + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        search.step(cost)
    return (weight.detach() / spread).to(features)


def probe_classifiers(
    model: ToCo, source, config: TrainConfig, *, n_images: int | None = None, decay: float = 0.01
) -> dict[int, Tensor]:
    """Block -> `fitted_classifier` on its patch tokens, pooled as for the auxiliary classifier, for every block.

    source: a split whose image-level labels are read; its first `n_images` (None: all), each at `crop_size` square.
    """
    features, labels, pooling = [], [], model.config.poolings[1]
    for items, tokens, _ in _tokens_of_split(model, source, config, n_images):
        features.append([classifier_input(block, pooling) for block in tokens])
        labels += [item.image_labels for item in items]
    features = [torch.cat(parts) for parts in zip(*features, strict=True)]
    image_labels = torch.cat(labels).to(features[0].device)
    if pooling == "cam_topk":
        return {number: _warm_started(model, x, image_labels.float()) for number, x in enumerate(features, 1)}
    return {number: fitted_classifier(x, image_labels, decay=decay) for number, x in enumerate(features, 1)}


def _warm_started(model: ToCo, tokens: Tensor, image_labels: Tensor) -> Float[Tensor, "K D"]:
    """A classifier of the scores at tokens, from a fixed beginning."""
    generator = torch.Generator().manual_seed(0)
    classifier = torch.nn.Linear(model.width, model.n_classes, bias=False)
    torch.nn.init.normal_(classifier.weight, std=model.width**-0.5, generator=generator)
    classifier.to(tokens.device)
    options = {"steps": PROBE_STEPS, "generator": generator, "pooling": "cam_topk"}
    with torch.enable_grad():
        fit_classifier(classifier, tokens, image_labels, **options)
    return classifier.weight.detach().to(model.classifier.weight.dtype)


def score_block_cams(
    model: ToCo,
    source,
    config: TrainConfig,
    classifiers: Mapping[str, Mapping[int, Tensor]],
    *,
    n_images: int | None = None,
) -> dict[str, dict[int, CAMCounts]]:
    """Score the CAM of every classifier in a table name -> block -> weight; returns a table of the same form.

    As in `evaluate`, of each image the labelled classes count, at native size, where the mask is not 255. Images are
    seen at `crop_size` square. Raises ToCoError for a block that is not there and for an image without mask.
    """
    for number in {number for weights in classifiers.values() for number in weights}:
        if not 1 <= number <= model.depth:
            raise ToCoError(f"block = {number} is not allowed: the backbone has blocks 1..{model.depth}")
    counts = {name: {number: CAMCounts(model.n_classes) for number in w} for name, w in classifiers.items()}
    for items, tokens, grid in _tokens_of_split(model, source, config, n_images):
        size = tuple(items[0].image.shape[-2:])
        for name, weights in classifiers.items():
            for number, weight in weights.items():
                cams = token_cam(tokens[number - 1], weight, grid, size)
                for item, cam in zip(items, cams, strict=True):
                    if item.mask is None:
                        raise ToCoError(f"{item.name} has no mask: scores need a split with masks")
                    labels = item.image_labels.to(cam.device)
                    counts[name][number].update(item.mask, *strongest(cam[None], labels, item.mask.shape))
    return counts


def _tokens_of_split(
    model: ToCo, source, config: TrainConfig, n_images: int | None
) -> Iterator[tuple[list[EvalItem], list[Tensor], tuple[int, int]]]:
    """Batches of a split: the items, their patch tokens after each block (the last normed) in float32, the grid."""
    source = source if n_images is None else source.subset(range(min(n_images, len(source))))
    device, size = model.classifier.weight.device, config.data.crop_size
    autocast, items = autocast_of(config, device), evaluation_items(source, size=size)
    grid = tuple(side // patch for side, patch in zip(model.fitted_size(size, size), model.patch_size, strict=True))
    for batch in in_batches(items, BATCH):
        images = model.normalise(to_unit(torch.cat([item.image for item in batch]).to(device)))
        with torch.no_grad(), attention_of(model, config, device), autocast():
            tokens = tokens_by_block(model, images)
        yield batch, [t.to(model.classifier.weight.dtype) for t in tokens], grid
