"""Scores: mean intersection over union of label maps, mean average precision and F1 of image-level predictions.

Label maps are counted into a confusion matrix (rows: ground truth, columns: prediction), from which every score
follows. Pixels whose ground truth is 255 are ignored whatever is predicted there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor

from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError

EXACT_COUNTS = 2**24  # pixels at a time: OpenCV counts in float32


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, each in [0, 1].

    A class that the ground truth never shows does not count in the means, however often it was predicted (the release
    does so too); its own IoU is 0 if it was predicted and NaN if not. A mean over nothing is NaN.
    """

    miou: float  # mean of iou over the classes of the ground truth
    iou: np.ndarray  # (C,) right / (truth + predicted - right)
    pixel_accuracy: float  # right pixels / all
    mean_accuracy: float  # mean of recall over the classes of the ground truth
    precision: np.ndarray  # (C,) right / predicted, NaN for a class that was never predicted
    recall: np.ndarray  # (C,) right / truth, NaN for a class that the ground truth never shows


class ConfusionMatrix:
    """Counts of (ground truth, prediction) over any number of label maps with C = K + 1 classes, background first."""

    def __init__(self, n_classes: int):
        """`n_classes` is K, the number of foreground classes. Raises ToCoError unless 1 <= K <= 254."""
        if not 1 <= n_classes < IGNORE:
            raise ToCoError(f"n_classes = {n_classes} is not allowed: 1 to {IGNORE - 1} foreground classes")
        self.n_classes = n_classes
        self.counts = np.zeros((n_classes + 1, n_classes + 1), dtype=np.int64)

    def update(self, ground_truth: np.ndarray | Tensor, prediction: np.ndarray | Tensor) -> None:
        """Adds the pixels of label maps of any equal shape, 0..C-1 each; uint8 is fastest.

        Raises ToCoError, and counts nothing, for different shapes and for values outside the classes (255 is allowed in
        the ground truth, and anything in the prediction where the ground truth is 255).
        """
        if tuple(ground_truth.shape) != tuple(prediction.shape):
            raise ToCoError(
                f"prediction of shape {tuple(prediction.shape)} for a ground truth of shape "
                f"{tuple(ground_truth.shape)}: equal shapes are required"
            )
        self.counts += _count(_bytes("ground truth", ground_truth), _bytes("prediction", prediction), len(self.counts))

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds what another process or part has counted."""
        if other.n_classes != self.n_classes:
            raise ToCoError(f"a matrix of {other.n_classes} classes cannot be merged into one of {self.n_classes}")
        self.counts += other.counts

    def scores(self) -> Scores:
        """What the counts so far say."""
        return _scores(self.counts)


class OpenCounts:
    """Pixels by what the ground truth shows (rows 0..K) and what a label says (columns 0..K, then open: 255).

    For labels that leave pixels open. An open pixel is a missed one of its true class: it costs recall and no
    precision, and a label that commits itself nowhere has an mIoU of 0.
    """

    def __init__(self, n_classes: int, counts: Int64[np.ndarray, "C C1"] | None = None):
        """`n_classes` is K; background comes on top. `counts`: those of another, or a sum of several."""
        self.counts = np.zeros((n_classes + 1, n_classes + 2), np.int64) if counts is None else counts

    def update(self, ground_truth: np.ndarray, label: np.ndarray) -> None:
        """Adds the pixels of maps of equal shape, 0..K or 255 each. Raises ToCoError as `ConfusionMatrix.update`."""
        C, is_open = len(self.counts), label == IGNORE
        matrix = ConfusionMatrix(C - 1)
        matrix.update(ground_truth, np.where(is_open, 0, label))
        missed = np.bincount(ground_truth[is_open & (ground_truth != IGNORE)], minlength=C)
        counts = np.column_stack([matrix.counts, missed])
        counts[:, 0] -= missed  # they stood for background
        self.counts = self.counts + counts

    def scores(self) -> Scores:
        """Scores of the C classes over all pixels."""
        return _scores(self.counts)

    def decided_scores(self) -> Scores:
        """Scores over the pixels that the label decides."""
        return _scores(self.counts[:, :-1])

    @property
    def decided(self) -> float:
        """Share of the pixels that the label decides; NaN where there is none."""
        total = self.counts.sum()
        return float(self.counts[:, :-1].sum() / total) if total else float("nan")


class MultiLabelScores(NamedTuple):
    """Scores of image-level predictions, each in [0, 1]."""

    mean_average_precision: float  # over the classes that some image has; NaN if there is none
    average_precision: np.ndarray  # (K,) NaN for a class that no image has
    f1: float  # mean over images, 1 for an image that has no class and for which none is predicted


def multi_label_scores(logits: Float[Tensor, "B K"], image_labels: Shaped[Tensor, "B K"]) -> MultiLabelScores:
    """Average precision per class and F1 per image of image-level logits.

    Average precision ranks the images by a class's logit, equal logits sharing one rank. F1 takes the classes whose
    probability is above 0.5 (logit above 0) as predicted.
    """
    logits, wanted = logits.detach().cpu().double().numpy(), (image_labels > 0).cpu().numpy()
    predicted = logits > 0
    hits, total = (predicted & wanted).sum(1), predicted.sum(1) + wanted.sum(1)
    f1 = np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)
    precision = np.array([average_precision(logits[:, k], wanted[:, k]) for k in range(logits.shape[1])])
    return MultiLabelScores(_mean(precision[wanted.any(0)]), precision, _mean(f1))


def in_groups(items: Sequence | np.ndarray, n: int) -> list:
    """Disjoint groups, item i in group i mod `n`. Raises ToCoError where a group would be empty."""
    if not 1 <= n <= len(items):
        raise ToCoError(f"groups = {n} is not allowed: 1 to {len(items)}, the number of images")
    return [items[g::n] for g in range(n)]


def average_precision(score: np.ndarray, wanted: np.ndarray) -> float:
    """Sum over the ranks of (recall gained) * precision, in [0, 1], for `score` and `wanted` (bool) of one length.

    Equal scores share one rank, so that a constant score gives the share of what is wanted. NaN where nothing is.
    """
    if not wanted.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # last place of each rank
    hits, places = np.cumsum(wanted[order])[last], np.flatnonzero(last) + 1
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / places))


def _scores(counts: Int64[np.ndarray, "C M"]) -> Scores:
    """Scores of the classes from pixels by ground truth (rows) and label: its C classes, and open in a column more."""
    right, truth = np.diag(counts).astype(np.float64), counts.sum(1)
    predicted = counts[:, : len(counts)].sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that `Scores` promises
        iou, precision, recall = right / (truth + predicted - right), right / predicted, right / truth
        pixel_accuracy = right.sum() / truth.sum()
    shown = truth > 0
    return Scores(
        miou=_mean(iou[shown]),
        iou=iou,
        pixel_accuracy=float(pixel_accuracy),
        mean_accuracy=_mean(recall[shown]),
        precision=precision,
        recall=recall,
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _bytes(name: str, labels: np.ndarray | Tensor) -> UInt8[np.ndarray, " M"]:
    """Flat, as uint8."""
    if isinstance(labels, Tensor):
        if labels.is_floating_point():
            raise ToCoError(f"{name} of type {labels.dtype}: whole numbers are allowed")
        labels = labels.cpu().numpy()
    if labels.dtype != np.uint8:
        if labels.dtype.kind not in "iub":
            raise ToCoError(f"{name} of type {labels.dtype}: whole numbers are allowed")
        if labels.size and not (labels.min() >= 0 and labels.max() <= IGNORE):
            raise ToCoError(f"{name} with values from {labels.min()} to {labels.max()}: 0 to 255 are allowed")
        labels = labels.astype(np.uint8)
    return np.ascontiguousarray(labels).reshape(-1)


def _count(
    truth: UInt8[np.ndarray, " M"], prediction: UInt8[np.ndarray, " M"], n_classes: int
) -> Int64[np.ndarray, "C C"]:
    """Confusion matrix of two flat maps: OpenCV's histogram over pairs of bytes."""
    if not len(truth):
        return np.zeros((n_classes, n_classes), dtype=np.int64)
    columns = 1 << max(1, (n_classes - 1).bit_length())
    if prediction.max() >= columns:  # has no column: allowed only where it is ignored
        prediction = np.where(truth == IGNORE, 0, prediction).astype(np.uint8)
        if prediction.max() >= n_classes:
            raise ToCoError(f"prediction with the value {prediction.max()}: 0 to {n_classes - 1} are allowed")
    table = np.zeros((256, columns), dtype=np.int64)
    for start in range(0, len(truth), EXACT_COUNTS):
        pair = [labels[start : start + EXACT_COUNTS] for labels in (truth, prediction)]
        table += cv2.calcHist(pair, [0, 1], None, [256, columns], [0, 256, 0, columns]).astype(np.int64)
    unknown = np.flatnonzero(table[n_classes:IGNORE].any(1)) + n_classes
    if len(unknown):
        raise ToCoError(f"ground truth with the value {unknown[0]}: 0 to {n_classes - 1} and {IGNORE} are allowed")
    wrong = np.flatnonzero(table[:n_classes, n_classes:].any(0)) + n_classes
    if len(wrong):
        raise ToCoError(f"prediction with the value {wrong[0]}: 0 to {n_classes - 1} are allowed")
    return table[:n_classes, :n_classes]
