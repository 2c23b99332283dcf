"""One checkpoint under every protocol, image by image: what the paper's tables of labels and segmentation report.

    kind           label of a pixel
    cam, aux_cam   the strongest labelled class of the CAM where it is above one threshold, else background
    refined        the final CAM, refined by PAR, where it is above one threshold
    pseudo_label   final CAM between two thresholds, refined by PAR: what the decoder learns from
    vote           the mean of both CAMs and the decoder's probabilities, refined by PAR, where it is above `beta`
    seg            the decoder, one pass
    seg_ms         the decoder over several scales, each also mirrored
    seg_crf        the same, its probabilities refined by the dense CRF

The first five know the image's labels, the others do not. `assess` keeps one confusion matrix per image and kind, from
which every score of the whole, of a class and of an image follows. A pseudo label may leave a pixel open (255): it then
counts as a missed pixel of its true class, so open pixels cost recall and no precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm import tqdm

from toco_core.cam import CAMViews
from toco_core.config import TrainConfig, override
from toco_core.data import Split, TrainVal, evaluation_items, open_data, open_source
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import cam_named, listed
from toco_core.evaluation.metrics import OpenCounts, Scores, in_groups
from toco_core.evaluation.scores import reported_part
from toco_core.machine.device import resolve_device
from toco_core.machine.precision import passes_of
from toco_core.model import ToCo
from toco_core.predict.image import ImagePredictor, eval_size
from toco_core.predict.segmentation import checked_crf, crf_named
from toco_core.runs.opened import open_run
from toco_core.runs.release import from_release
from toco_core.train.loop import trained_run

KINDS = ("cam", "aux_cam", "refined", "pseudo_label", "vote", "seg", "seg_ms", "seg_crf")
MULTI_SCALES = (0.75, 1.0, 1.25)


class AssessedModel(NamedTuple):
    """What is assessed: a model in evaluation mode, how to look at it, its data, where it came from."""

    model: ToCo
    config: TrainConfig
    data: TrainVal
    origin: str


def open_assessed(
    config: TrainConfig, *, run: str = "", checkpoint: str = "", heads: int | None = None, changes: dict | None = None
) -> AssessedModel:
    """A model from a finished run's folder, from a checkpoint of the published release, or else from the run of
    `config`, trained first where it is not finished.

    `changes` are fields in which a run's own config is overridden, for instance another `dataset` of the same classes.
    `heads` are attention heads of a release checkpoint, which its shapes do not tell (width / 64 if None). Raises
    ToCoError for both `run` and `checkpoint`, and where model and data differ in the number of classes.
    """
    if run and checkpoint:
        raise ToCoError(f"run = {run!r} and checkpoint = {checkpoint!r}: one of them is allowed")
    if run:
        opened = open_run(run, device=config.device)
        config = override(opened.config, **(changes or {}))
        data = opened.data if config.data == opened.config.data else open_data(config.data)
        subject = AssessedModel(opened.model, config, data, "run " + opened.run.folder.name)
    elif checkpoint:
        model = from_release(checkpoint, heads=heads, layer=config.model.layer)
        subject = AssessedModel(
            model.to(resolve_device(config.device)).eval(), config, open_data(config.data), "checkpoint"
        )
    else:
        opened = trained_run(config)
        subject = AssessedModel(opened.model, config, opened.data, "run " + opened.run.folder.name)
    if subject.model.n_classes != subject.data.val.n_classes:
        raise ToCoError(
            f"the model tells {subject.model.n_classes} classes apart, {subject.data.val.root.name} has "
            f"{subject.data.val.n_classes}: equal numbers are required"
        )
    return subject


class AssessedSplit(NamedTuple):
    """A split under the name that scores are reported with."""

    name: str
    source: Split


def part_of(data: TrainVal, split: str = "auto") -> AssessedSplit:
    """A part of the data set; "auto" is the one that results are told of (`scores.reported_part`).

    "val" is the part that training validates on, also where it was cut from the list of train, and is then named so.
    """
    source = reported_part(data)[1] if split == "auto" else data.val
    if split not in ("auto", "val"):
        return AssessedSplit(split, open_source(data.val.root, split))
    return AssessedSplit(data.val_name if source is data.val else source.split, source)


def evenly(source, n: int):
    """`n` images spread evenly over a split, in its order; all of them for 0 or where it has no more."""
    if n < 0:
        raise ToCoError(f"n_images = {n} is not allowed: 0 (all) or more")
    if not 0 < n < len(source):
        return source
    return source.subset([i * len(source) // n for i in range(n)])


def labels_of(
    model: ToCo,
    source,
    index: int,
    config: TrainConfig,
    *,
    beta: float,
    aux_beta: float,
    refined_beta: float,
    scales: Sequence[float] = MULTI_SCALES,
    crf: bool | Mapping = True,
) -> dict[str, UInt8[np.ndarray, "H W"]]:
    """Every kind of label of image `index` of a split, at its native size; without "seg_crf" unless `crf`.

    The model sees the image as `config` says. `scales` are those of "seg_ms" and "seg_crf"; `crf` is True, for the
    settings that are usual for VOC, or a mapping with fields of `refiners.crf.CRFSettings`.
    """
    options = checked_crf(crf)
    predictor = ImagePredictor(model, config, passes=passes_of(model, config))
    predictor.set_item(next(evaluation_items(source.subset([index]), size=eval_size(config), native=True)))
    found = {
        "cam": predictor.cam_label(beta),
        "aux_cam": predictor.cam_label(aux_beta, auxiliary=True),
        "refined": predictor.refined_label(refined_beta),
        "pseudo_label": predictor.pseudo_label(),
        "vote": predictor.voted_label(),
        "seg": predictor.segmentation(),
        "seg_ms": predictor.segmentation(scales=scales),
    }
    return found if options is None else found | {"seg_crf": predictor.segmentation(scales=scales, crf=options)}


@dataclass(frozen=True)
class Assessment:
    """Counts of M images under each protocol; scores follow from them."""

    names: tuple[str, ...]
    counts: dict[str, Int64[np.ndarray, "M C C1"]]
    """Kind -> per image: rows the mask's classes, columns the label's, background first; the last column is open."""
    protocol: dict[str, str]
    """Kind -> how its labels were made."""

    def total(self, kind: str) -> Int64[np.ndarray, "C C1"]:
        """Counts of all images."""
        return self.counts[kind].sum(0)

    def scores(self, kind: str) -> Scores:
        """Scores of all images together."""
        return self._counted(self.total(kind)).scores()

    def image_iou(self, kind: str) -> np.ndarray:
        """Per image the mean IoU over the classes that its mask shows, in [0, 1]; NaN for a mask that is all void."""
        return np.array([self._counted(one).scores().miou for one in self.counts[kind]])

    def group_miou(self, kind: str, groups: int = 4) -> np.ndarray:
        """mIoU in [0, 1] on disjoint groups of images, image i in group i mod `groups`: how much a score moves from one
        handful of images to the next. Raises ToCoError where a group would be empty."""
        parts = in_groups(self.counts[kind], groups)
        return np.array([self._counted(part.sum(0)).scores().miou for part in parts])

    def worst(self, kind: str, n: int) -> list[int]:
        """Places of the `n` images with the lowest `image_iou`, worst first."""
        iou = self.image_iou(kind)
        return [int(i) for i in np.argsort(iou, kind="stable")[: min(n, int(np.isfinite(iou).sum()))]]

    def decided(self, kind: str) -> float:
        """Share of the pixels that the label does not leave open."""
        return self._counted(self.total(kind)).decided

    @staticmethod
    def _counted(counts: Int64[np.ndarray, "C C1"]) -> OpenCounts:
        return OpenCounts(len(counts) - 1, counts)

    def summary(self, class_names: Sequence[str]) -> dict:
        """Every score in percent as plain numbers, each kind with its protocol; null where there is none."""
        return {kind: self._summary(kind, class_names) for kind in self.counts}

    def _summary(self, kind: str, class_names: Sequence[str]) -> dict:
        scores = self.scores(kind)
        per_class = {
            name: {score: _percent(getattr(scores, score)[c]) for score in ("iou", "precision", "recall")}
            for c, name in enumerate(class_names)
        }
        whole = {"miou": _percent(scores.miou), "pixel_accuracy": _percent(scores.pixel_accuracy)}
        return whole | {"decided": _percent(self.decided(kind)), "protocol": self.protocol[kind], "classes": per_class}


def assess(
    model: ToCo,
    source,
    config: TrainConfig,
    *,
    beta: float,
    aux_beta: float,
    refined_beta: float,
    part: str,
    chosen_on: str,
    scales: Sequence[float] = MULTI_SCALES,
    crf: bool | Mapping = True,
    progress: bool = True,
) -> Assessment:
    """Score every kind of label on a split with masks.

    `part` is what the protocols call this split, `chosen_on` the one on which the three thresholds were chosen.

    Other arguments as in `labels_of`. Raises ToCoError for an image without a mask.
    """
    counts: dict[str, np.ndarray] = {}
    thresholds = {"beta": beta, "aux_beta": aux_beta, "refined_beta": refined_beta}
    for index in tqdm(range(len(source)), desc="assessing", unit="image", disable=not progress, leave=False):
        mask = source.mask(index)
        if mask is None:
            raise ToCoError(f"{source.names[index]} has no mask: scores need a split with masks")
        found = labels_of(model, source, index, config, **thresholds, scales=scales, crf=crf)
        for kind, label in found.items():
            one = OpenCounts(model.n_classes)
            one.update(mask, label)
            if kind not in counts:
                counts[kind] = np.zeros((len(source), *one.counts.shape), np.int64)
            place = one.counts.nonzero()  # few of them: zeros that nobody writes take no memory
            counts[kind][(index, *place)] = one.counts[place]
    side = eval_size(config)
    where = f"{len(source)} images of {part} at {f'{side} x {side}' if side else 'native size'}"
    cam = f"{where}, image labels known, CAM {cam_named(CAMViews(**config.labels.cam_options()))}"
    two, refiner = f"thresholds {config.labels.beta_l:g} and {config.labels.beta_h:g}", refiner_named(config)
    several = f"{where}, scales {listed(scales)} + flip"
    protocol = {
        "cam": f"{cam}, threshold {beta:g} chosen on {chosen_on}",
        "aux_cam": f"{cam}, threshold {aux_beta:g} chosen on {chosen_on}",
        "refined": f"{cam}, {refiner}, threshold {refined_beta:g} chosen on {chosen_on}",
        "pseudo_label": f"{cam}, {refiner}, {two}, open pixels count as missed",
        "vote": f"{cam}, with the auxiliary CAM and the decoder, {refiner}, threshold {config.labels.beta:g}",
        "seg": f"{where}, scale 1, no flip, no CRF",
        "seg_ms": f"{several}, no CRF",
        "seg_crf": f"{several}, {crf_named(checked_crf(crf))}",
    }
    return Assessment(tuple(source.names), counts, {k: protocol[k] for k in counts})


def refiner_named(config: TrainConfig) -> str:
    """How a protocol names what refines pseudo labels."""
    labels = config.labels
    return f"PAR {labels.par_iterations} iterations" if labels.refiner == "par" else f"refiner {labels.refiner}"


def _percent(value: float) -> float | None:
    return round(100 * float(value), 2) if np.isfinite(value) else None
