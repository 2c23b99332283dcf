"""How good the labels made from CAMs are, by the masks that training never sees.

CAMs are the expensive half, so they are made once (`cams_of_split`) and kept; every threshold and every refinement is
then tried on what is kept. A label with an uncertain part (255) cannot be judged by one number, so `LabelQuality` has

    miou          over the pixels that the label decides: what the decoder is taught
    coverage      the share of pixels that it decides
    strict_miou   over all pixels: an uncertain pixel counts as missed, in the union and not in the intersection

A label gains the first by giving up the second; the third falls when it gives up what it had right.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from toco_core.cam import labelled_cams
from toco_core.config import LabelConfig, TrainConfig
from toco_core.conventions import IGNORE
from toco_core.data import evaluation_items, to_unit
from toco_core.errors import ToCoError
from toco_core.evaluation.metrics import OpenCounts, in_groups
from toco_core.labels import eval_label, pseudo_label, refined_labels, seed_label
from toco_core.model import ToCo
from toco_core.predict.image import eval_size


class ImageCAMs(NamedTuple):
    """One image and the CAMs of its k labelled classes, at the size H W at which the model saw it."""

    name: str
    image: UInt8[np.ndarray, "nh nw 3"]  # native size
    mask: UInt8[np.ndarray, "nh nw"]
    unit: Float[Tensor, "1 3 H W"]  # what the model saw, in [0, 1]
    classes: Int[np.ndarray, " k"]  # the labelled classes, 1..K, ascending
    cam: Float[Tensor, "1 k H W"]
    aux_cam: Float[Tensor, "1 k H W"]

    @property
    def present(self) -> Float[Tensor, "1 k"]:
        """Image labels that belong to the kept CAMs: all ones."""
        return torch.ones_like(self.cam[:, :, 0, 0])

    def native(self, label: Int[Tensor, "*T H W"]) -> UInt8[np.ndarray, "*T nh nw"]:
        """Labels 0..k of the kept CAMs as classes 0..K (255 stays), at the image's own size (nearest pixel)."""
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        table[: len(self.classes) + 1] = [0, *self.classes]
        flat = label.reshape(1, -1, *label.shape[-2:]).to(torch.float32)
        resized = F.interpolate(flat, size=self.mask.shape, mode="nearest")[0].to(torch.uint8)
        return table[resized.cpu().numpy()].reshape(*label.shape[:-2], *self.mask.shape)


@torch.no_grad()
def cams_of_split(model: ToCo, source, config: TrainConfig) -> list[ImageCAMs]:
    """The CAMs of every image of a split, at the size and over the scales that `config` evaluates with.

    They stay on the model's device. Raises ToCoError for an image without a mask, which nothing could judge.
    """
    found = []
    for index, item in enumerate(evaluation_items(source, size=eval_size(config))):
        if item.mask is None:
            raise ToCoError(f"image {item.name} has no mask: labels are judged by masks")
        unit = to_unit(item.image).to(model.classifier.weight)
        cams, classes, _ = labelled_cams(model, model.normalise(unit), item.image_labels, **config.labels.cam_options())
        found.append(ImageCAMs(item.name, source.image(index), item.mask, unit, classes[0].cpu().numpy() + 1, *cams))
    return found


# ---- labels of one image, at native size


def seed_of(item: ImageCAMs, labels: LabelConfig) -> UInt8[np.ndarray, "nh nw"]:
    """The final CAM between its two thresholds, not refined."""
    return item.native(seed_label(item.cam, item.present, **labels.thresholds()))[0]


def pseudo_of(item: ImageCAMs, labels: LabelConfig) -> UInt8[np.ndarray, "nh nw"]:
    """The same refined as `labels` describes it: by PAR, as published."""
    return item.native(pseudo_label(item.unit, item.cam, item.present, **labels.pseudo_label_options()))[0]


def crf_of(item: ImageCAMs, labels: LabelConfig, **settings) -> UInt8[np.ndarray, "nh nw"]:
    """The same after the dense CRF in PAR's place; `settings` are fields of `refiners.crf.DenseCRF`. At the size that
    the model saw (`scale` 1) it is the label that `export` writes with method "crf"."""
    options = labels.thresholds() | {"refiner": "crf"} | settings
    return item.native(pseudo_label(item.unit, item.cam, item.present, **options))[0]


# ---- quality


class LabelQuality(NamedTuple):
    """Scores of labels in [0, 1]; NaN where there is nothing to divide by. Void pixels of the masks do not count."""

    miou: float  # over the decided pixels, mean over the classes that the mask shows there
    strict_miou: float  # over all pixels, uncertain ones as missed, mean over the classes that the mask shows
    coverage: float  # decided pixels / all
    background_precision: float  # of the pixels labelled background, the share that is
    background_recall: float  # of the background's pixels, the share that is labelled so
    foreground_precision: float  # of the pixels labelled with a class, the share that shows this class
    foreground_recall: float  # of the objects' pixels, the share that is labelled with its class
    uncertain_foreground: float  # of the uncertain pixels, the share that belongs to objects


class LabelCounts(OpenCounts):
    """Counts over masks and labels whose uncertain pixels are open, and what they say of the labels."""

    def quality(self) -> LabelQuality:
        """What the counts so far say."""
        counts = self.counts.astype(np.float64)
        right, truth, predicted, uncertain = np.diag(counts), counts.sum(1), counts[:, :-1].sum(0), counts[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is the NaN that `LabelQuality` promises
            return LabelQuality(
                miou=self.decided_scores().miou,
                strict_miou=self.scores().miou,
                coverage=self.decided,
                background_precision=float(right[0] / predicted[0]),
                background_recall=float(right[0] / truth[0]),
                foreground_precision=float(right[1:].sum() / predicted[1:].sum()),
                foreground_recall=float(right[1:].sum() / truth[1:].sum()),
                uncertain_foreground=float(uncertain[1:].sum() / uncertain.sum()),
            )

    def composition(self) -> Float[np.ndarray, "3 3"]:
        """Shares of all pixels. Rows: labelled background, uncertain, labelled with a class. Columns: the mask shows
        background; an object (in the last row: of that class); in the last row only, an object of another class."""
        counts = self.counts
        right = np.trace(counts[1:, 1:-1])
        background, uncertain, foreground = counts[:, 0], counts[:, -1], counts[:, 1:-1].sum(1)
        rows = [
            [background[0], background[1:].sum(), 0],
            [uncertain[0], uncertain[1:].sum(), 0],
            [foreground[0], right, foreground[1:].sum() - right],
        ]
        return np.array(rows, np.float64) / max(counts.sum(), 1)


def count_labels(
    items: Iterable[ImageCAMs], label_of: Callable[[ImageCAMs], np.ndarray], n_classes: int
) -> LabelCounts:
    """Counts over images of the label that `label_of` makes of each; K = `n_classes`."""
    counts = LabelCounts(n_classes)
    for item in items:
        counts.update(item.mask, label_of(item))
    return counts


def quality_by_group(
    items: Sequence[ImageCAMs], label_of: Callable[[ImageCAMs], np.ndarray], n_classes: int, *, groups: int = 4
) -> list[LabelQuality]:
    """The quality of a label on disjoint groups of images, image i in group i mod `groups`: how much a score moves from
    one handful of images to the next. Raises ToCoError where a group would be empty."""
    return [count_labels(group, label_of, n_classes).quality() for group in in_groups(items, groups)]


# ---- pairs of thresholds


def threshold_grid(
    items: Iterable[ImageCAMs], betas: Sequence[float], labels: LabelConfig, n_classes: int, *, refined: bool
) -> dict[tuple[float, float], LabelQuality]:
    """(beta_l, beta_h) -> quality, for all pairs beta_l <= beta_h out of `betas`; `refined` says whether by the
    configured refiner.

    Equal thresholds leave nothing uncertain: coverage 1. An image is refined once per threshold, not once per pair.
    Raises ToCoError unless the thresholds ascend within [0, 1].
    """
    betas = [float(beta) for beta in betas]
    if not betas or betas != sorted(set(betas)) or not 0 <= betas[0] <= betas[-1] <= 1:
        raise ToCoError(f"betas = {betas}: different thresholds in ascending order, from 0 to 1, are allowed")
    counts = {(l, h): LabelCounts(n_classes) for i, l in enumerate(betas) for h in betas[i:]}
    for item in items:
        if refined:
            one = refined_labels(item.unit, item.cam, item.present, betas=betas, **labels.refiner_options())
        else:
            one = torch.stack([eval_label(item.cam, item.present, beta=beta) for beta in betas])
        label = dict(zip(betas, item.native(one[:, 0]), strict=True))
        for (l, h), pair in counts.items():
            pair.update(item.mask, np.where((label[h] == 0) & (label[l] != 0), IGNORE, label[h]))
    return {pair: found.quality() for pair, found in counts.items()}


def as_matrix(
    grid: dict[tuple[float, float], LabelQuality], betas: Sequence[float], score: str
) -> Float[np.ndarray, "T T"]:
    """One score of a grid, [beta_l, beta_h]; NaN below the diagonal."""
    return np.array([[getattr(grid[l, h], score) if (l, h) in grid else np.nan for h in betas] for l in betas])


def best_thresholds(grid: dict[tuple[float, float], LabelQuality], least_coverage: float) -> tuple[float, float]:
    """The pair beta_l < beta_h with the highest mIoU among those that decide at least this share of the pixels.

    Raises ToCoError where no pair does.
    """
    enough = {pair: q for pair, q in grid.items() if pair[0] < pair[1] and q.coverage >= least_coverage}
    if not enough:
        most = max((q.coverage for (l, h), q in grid.items() if l < h), default=0.0)
        raise ToCoError(f"least_coverage = {least_coverage}: at most {most:.2f} of the pixels are decided by any pair")
    return max(enough, key=lambda pair: np.nan_to_num(enough[pair].miou, nan=-1))  # NaN: nothing is decided
