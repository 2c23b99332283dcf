"""Scores of a model on a split: CAM, auxiliary CAM, segmentation and image-level predictions.

As published: the image at `size` square, CAM of the image's labelled classes over scales and mirrored, brought to
native size, where void pixels (255) do not count. A CAM becomes a label by one threshold `beta`; scores are kept for
all thresholds 0, 1/20, ..., 1 at once, so that a threshold can be chosen on one split and used on another. Segmentation
is scored as it comes, or after a dense CRF. Images without a mask count for the image-level predictions only.
"""

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from toco_core.cam import CAMs, CAMViews, multi_scale_cam
from toco_core.config import TrainConfig
from toco_core.conventions import IGNORE
from toco_core.data import EvalItem, evaluation_items, to_unit
from toco_core.data.fingerprint import file_digests
from toco_core.data.loader import loader_errors
from toco_core.errors import ToCoError
from toco_core.evaluation.metrics import ConfusionMatrix, MultiLabelScores, Scores, multi_label_scores
from toco_core.evaluation.resume import ImageCounts, KeptEvaluation
from toco_core.machine.distributed import ALONE, Share
from toco_core.machine.locks import alone
from toco_core.machine.memory import memory_errors
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.model import ToCo
from toco_core.predict.crf_workers import CRFWorkers
from toco_core.predict.image import computed_by, strongest
from toco_core.predict.image import eval_size as eval_size
from toco_core.predict.image import look as look
from toco_core.predict.segmentation import checked_crf, crf_named, maps_at, merged_label, segmentation_maps

N_THRESHOLDS = 20
ROWS = ("logits", "aux_logits", "image_labels")
AS_CAM = "as CAM"  # segmentation sees the images at the size at which the CAM does


class CAMCounts:
    """Confusion matrices of a CAM at the thresholds 0, 1/20, ..., 1: counted once, read at any of them."""

    betas = np.arange(N_THRESHOLDS + 1) / N_THRESHOLDS

    def __init__(self, n_classes: int):
        self.n_classes = n_classes
        self.counts = np.zeros((N_THRESHOLDS + 1, n_classes + 1, n_classes + 1), np.int64)

    def update(self, ground_truth: np.ndarray, value: np.ndarray, label: np.ndarray) -> None:
        """Add pixels of equal shape: ground truth 0..K or 255, the CAM's largest value in [0, 1], its class 1..K.

        Raises ToCoError for another value in the ground truth.
        """
        seen = ground_truth != IGNORE
        truth = ground_truth[seen]
        unknown = truth[(truth < 0) | (truth > self.n_classes)]
        if len(unknown):
            raise ToCoError(f"ground truth with the value {unknown[0]}: 0 to {self.n_classes} and {IGNORE} are allowed")
        first = np.searchsorted(self.betas.astype(value.dtype), value[seen])  # the first beta that is not below it
        C = self.n_classes + 1
        index = (first.clip(max=N_THRESHOLDS) * C + truth) * C + label[seen]
        self.counts += np.bincount(index, minlength=self.counts.size).reshape(self.counts.shape)

    def scores(self, beta: float) -> Scores:
        """Scores where a value of at most `beta` is background; `beta` is rounded to the nearest of `betas`."""
        nearest = int(np.abs(self.betas - beta).argmin())
        matrix = ConfusionMatrix(self.n_classes)
        matrix.counts = self.counts[nearest + 1 :].sum(0)
        matrix.counts[:, 0] += self.counts[: nearest + 1].sum((0, 2))
        return matrix.scores()

    @property
    def miou(self) -> np.ndarray:
        """mIoU at each of `betas`."""
        return np.array([self.scores(beta).miou for beta in self.betas])

    @property
    def best_beta(self) -> float:
        """The threshold with the highest mIoU on what was counted: to be used on another split.

        Raises ToCoError where no valid pixel was counted.
        """
        if not self.counts.any():
            raise ToCoError("no threshold is best: there are no masks, or none has a valid pixel (all are 255)")
        return float(self.betas[int(np.nanargmax(self.miou))])


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found on one split."""

    cam: CAMCounts
    aux_cam: CAMCounts
    seg: Scores
    classes: MultiLabelScores
    aux_classes: MultiLabelScores
    n_images: int
    protocol: str
    n_masks: int  # images that had a mask with a valid pixel; without any there is no mIoU

    def summary(self, beta: float) -> dict:
        """mIoU and mean average precision as plain numbers in percent, the CAMs at threshold `beta`.

        Without masks there are no mIoUs: their names are missing.
        """
        percent = {}
        if self.n_masks:
            percent = {
                "cam_miou": self.cam.scores(beta).miou,
                "aux_cam_miou": self.aux_cam.scores(beta).miou,
                "seg_miou": self.seg.miou,
            }
        percent |= {
            "map": self.classes.mean_average_precision,
            "aux_map": self.aux_classes.mean_average_precision,
        }
        return {name: round(100 * float(value), 3) for name, value in percent.items()}


def _alone_where_kept(function: Callable) -> Callable:
    """One process at a time fills a folder that keeps an evaluation; the next one waits, and finds it finished."""

    @functools.wraps(function)
    def waits(*args, share: Share = ALONE, keep: Path | str | None = None, **options):
        held = keep is not None and share.first
        with alone(Path(keep), "evaluates into", wait=share.n == 1) if held else contextlib.nullcontext():
            return function(*args, share=share, keep=keep, **options)

    return waits


@torch.no_grad()
@loader_errors()
@memory_errors("a smaller batch_size or size")
@_alone_where_kept
def evaluate(
    model: ToCo,
    source,
    *,
    size: int | None,
    seg_scales: Sequence[float] = (1.0,),
    max_over_scales: bool = True,
    seg_size: int | str | None = AS_CAM,
    crf: bool | Mapping = False,
    batch_size: int = 8,
    workers: int = 0,
    crf_workers: int = 0,
    autocast=None,
    on_batch: Callable | None = None,
    progress: bool = True,
    what: str = "evaluating",
    share: Share = ALONE,
    keep: Path | str | None = None,
    **cam_views: Any,
) -> Evaluation:
    """Score a model on a split, one batch of images in memory at a time. Nothing is written unless `keep` says where.

    Args:
        source: a split such as `VOCFolder`; image-level labels choose which classes' CAMs count, as published.
            Where an image has no mask, or one that is void, it counts for the image-level predictions only.
        size: images are stretched to this square; None keeps the native size.
        seg_scales, max_over_scales: of the segmentation, see `segmentation_maps` and `merged_label`; (1.0,) is one pass
            at scale 1, unflipped.
        seg_size: the same as `size` for the segmentation; the published numbers have a CAM at 448 square and a
            segmentation at native size (None).
        crf: refine the segmentation by a dense CRF on the image at native size before it is scored. True: with the
            settings that are usual for VOC; or a mapping with fields of `refiners.crf.CRFSettings`.
        workers: processes that read images.
        crf_workers: processes that compute the CRF while the network is at the next batch; 0 computes it here. On a CPU
            their number moves no bit.
        autocast: a function that returns the context to compute in; None: full precision.
        on_batch: called with each batch's items, its images in [0, 1], CAMs and image-level labels: what is measured on
            labels made from the CAMs needs no second pass.
        share: of several processes. Each sees its part of the images (`on_batch`, too), whole batches at a time; every
            one returns the scores of all, in counts equal to those of one process.
        keep: a folder in which every finished image stays (see `kept`). After an interruption the same call goes on
            there, and returns bit for bit what it would have: the batches are the same, only whole ones are skipped.
        cam_views: scales, flip and attention of the CAM (`cam.CAMViews`). Image-level predictions are made at scale 1,
            unflipped.

    Raises ToCoError for a folder that keeps another evaluation, and for `keep` together with `on_batch`, which would
    not see what is skipped.
    """
    crf_options = checked_crf(crf)
    if keep is not None and on_batch is not None:
        raise ToCoError("keep and on_batch: one of them is allowed, as on_batch would not see what was finished before")
    views = _Views(size, CAMViews(**cam_views), size if seg_size == AS_CAM else seg_size, tuple(seg_scales))
    protocol = f"{len(source)} images at {views}, {crf_named(crf_options)}"
    counted, mine = _Counted(model.n_classes), share.chunks(len(source), batch_size)
    kept, todo = None, mine
    if keep is not None:
        if share.first:
            exact = {"max_over_scales": max_over_scales, "crf": crf_options, "batch_size": batch_size}
            exact |= {"protocol": protocol, **views.settings(), **_depends_on(model, source, autocast)}
            kept = KeptEvaluation(keep, exact)
        kept = share.from_first(kept)
        todo = counted.add_finished(kept, source.names, mine, batch_size)
    numbers, waiting = iter(todo), deque()

    def finish(most: int) -> None:
        """Count the segmentations of the oldest images until at most so many wait for theirs."""
        while len(waiting) > most:
            number, item, counts, label = waiting.popleft()
            if label is not None:
                label = label.result() if isinstance(label, Future) else label
                matrix = ConfusionMatrix(model.n_classes)
                matrix.update(item.mask, label)
                counts = counts._replace(seg=matrix.counts)
            counted.add(number, counts)
            if kept is not None:
                kept.write(item.name, counts, label)
            bar.update()

    bar = tqdm(
        total=len(mine), initial=len(mine) - len(todo), desc=what, unit="image", disable=not progress, leave=False
    )
    with (
        bar,
        model.evaluating(),
        CRFWorkers(crf_workers, crf_options or {}, max_over_scales=max_over_scales) as refined,
    ):
        part = source if len(todo) == len(source) else source.subset(todo) if todo else ()
        native = crf_options is not None or views.seg_size != size
        found = evaluation_items(part, size=size, workers=workers, native=native) if todo else iter(())
        for items in _batches(found, batch_size):
            seen = _seen(model, items, views, autocast)
            if on_batch:
                on_batch(items, seen.unit, seen.cams, seen.image_labels)
            for b, item in enumerate(items):
                label = None
                if item.mask is not None and crf_options is not None:
                    label = refined.submit(seen.seg_maps[b], item.native)
                elif item.mask is not None:
                    label = merged_label(seen.seg_maps[b], item.mask.shape, max_over_scales=max_over_scales)
                    label = label[0].to(torch.uint8).cpu().numpy()
                waiting.append((next(numbers), item, _counts_of(seen, b, item), label))
            finish(2 * crf_workers)
        finish(0)
    counted = counted.of_all(share)
    if counted.n_masks < len(source):
        protocol += f", masks of {counted.n_masks} images" if counted.n_masks else ", no masks: no mIoU"
    if kept is not None and share.first:
        kept.finish(protocol)
    logits, aux_logits, truth = counted.predictions()
    return Evaluation(
        counted.cam,
        counted.aux_cam,
        counted.seg.scores(),
        multi_label_scores(logits, truth),
        multi_label_scores(aux_logits, truth),
        len(source),
        protocol,
        counted.n_masks,
    )


class _Views(NamedTuple):
    """How images are seen: by the CAM, and by the segmentation."""

    size: int | None
    cam: CAMViews
    seg_size: int | None
    seg_scales: tuple[float, ...]

    @property
    def once(self) -> bool:
        """Whether the segmentation is one pass at scale 1."""
        return self.seg_scales == (1.0,)

    def settings(self) -> dict:
        """What a kept evaluation writes down."""
        scales, flip, *carried, class_attention = self.cam
        found = {"size": self.size, "scales": scales, "flip": flip, "seg_size": self.seg_size}
        found |= {"seg_scales": self.seg_scales} | ({"class_attention": class_attention} if class_attention else {})
        return found | ({"attention": carried} if self.cam.attention_steps else {})

    def __str__(self) -> str:
        return (
            f"{_named(self.size)}, CAM {cam_named(self.cam)}, "
            f"segmentation {'' if self.seg_size == self.size else f'at {_named(self.seg_size)} '}"
            f"{'once' if self.once else f'scales {listed(self.seg_scales)} + flip'}"
        )


class _BatchPrediction(NamedTuple):
    """What the network says of a batch."""

    unit: Tensor  # the images in [0, 1]
    image_labels: Tensor
    cams: CAMs
    class_logits: Tensor
    aux_class_logits: Tensor
    seg_maps: list[list[Tensor]]  # per image, per scale


def _seen(model: ToCo, items: Sequence[EvalItem], views: _Views, autocast: Callable | None) -> _BatchPrediction:
    device = model.classifier.weight.device
    unit = to_unit(torch.cat([i.image for i in items]).to(device))
    image_labels = torch.cat([i.image_labels for i in items]).to(device)
    images = model.normalise(unit)
    with autocast() if autocast else torch.autocast(device.type, enabled=False):
        tokens = model.encode(images, attend=views.cam.attended(), classes=views.cam.class_attention > 0)
        output = model.heads(tokens)
        cams = multi_scale_cam(model, images, tokens=tokens, image_labels=image_labels, **views.cam._asdict())
        if views.seg_size != views.size:
            seg_maps = maps_at(model, [i.native for i in items], views.seg_size, views.seg_scales)
        else:
            maps = [output.seg_logits] if views.once else segmentation_maps(model, images, views.seg_scales)
            seg_maps = [[m[b : b + 1] for m in maps] for b in range(len(items))]
    return _BatchPrediction(unit, image_labels, cams, output.class_logits, output.aux_class_logits, seg_maps)


def _counts_of(seen: _BatchPrediction, b: int, item: EvalItem) -> ImageCounts:
    """What image `b` of a batch adds, but for its segmentation."""
    one, found = slice(b, b + 1), _nothing(seen.image_labels.shape[1])
    rows = (seen.class_logits[b].float(), seen.aux_class_logits[b].float(), seen.image_labels[b])
    found = found._replace(**dict(zip(ROWS, (row.cpu().numpy() for row in rows), strict=True)))
    if item.mask is None:
        return found
    maps = [CAMCounts(seen.image_labels.shape[1]) for _ in seen.cams]
    for counts, cams in zip(maps, seen.cams, strict=True):
        counts.update(item.mask, *strongest(cams[one], seen.image_labels[one], item.mask.shape))
    return found._replace(cam=maps[0].counts, aux_cam=maps[1].counts, has_mask=bool(maps[0].counts.any()))


def _nothing(n_classes: int) -> ImageCounts:
    """The counts of an image without a mask, whose predictions are 0."""
    cam, seg = CAMCounts(n_classes).counts, ConfusionMatrix(n_classes).counts
    return ImageCounts(cam, cam, seg, *[np.zeros(n_classes, np.float32)] * len(ROWS), False)


class _Counted:
    """The sum over images, and their image-level predictions."""

    def __init__(self, n_classes: int):
        self.cam, self.aux_cam, self.seg = CAMCounts(n_classes), CAMCounts(n_classes), ConfusionMatrix(n_classes)
        self.n_masks = 0
        self._rows: dict[int, tuple[np.ndarray, ...]] = {}

    def add(self, number: int, image: ImageCounts) -> None:
        """Image `number` of the split."""
        self.cam.counts += image.cam
        self.aux_cam.counts += image.aux_cam
        self.seg.counts += image.seg
        self.n_masks += image.has_mask
        self._rows[number] = tuple(getattr(image, name) for name in ROWS)

    def add_finished(self, kept: KeptEvaluation, names: Sequence[str], mine: list[int], batch_size: int) -> list[int]:
        """The images of finished batches; returns the others. (In a batch of other images an image may get other
        bits.)"""
        todo = []
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            if not all(kept.has(names[number]) for number in batch):
                todo += batch
                continue
            for number in batch:
                self.add(number, kept.read(names[number], like=_nothing(self.cam.n_classes)))
        return todo

    def of_all(self, share: Share) -> "_Counted":
        """What all processes have counted together."""
        parts = share.gathered(self)
        whole = _Counted(self.cam.n_classes)
        for name in ("cam", "aux_cam", "seg"):
            getattr(whole, name).counts = sum(getattr(part, name).counts for part in parts)
        whole.n_masks = sum(part.n_masks for part in parts)
        whole._rows = {number: rows for part in parts for number, rows in part._rows.items()}
        return whole

    def predictions(self) -> list[Tensor]:
        """Logits, auxiliary logits and image-level labels, a row per image, in the order of the split."""
        columns = zip(*(self._rows[number] for number in sorted(self._rows)), strict=True)
        return [torch.from_numpy(np.stack(column)) for column in columns]


def _depends_on(model: ToCo, source, autocast: Callable | None) -> dict:
    """All that an evaluation's numbers depend on besides its arguments; images and masks by what their files hold."""
    with autocast() if autocast else torch.autocast(model.classifier.weight.device.type, enabled=False):
        computed = computed_by(model)
    return computed | {
        "images": hashlib.sha256("\n".join(source.names).encode()).hexdigest(),
        "image_labels": hashlib.sha256(np.ascontiguousarray(source.image_labels).tobytes()).hexdigest(),
        **file_digests(source),
    }


def cam_named(views: CAMViews) -> str:
    """ "scales 1, 0.5 + flip", and whether the CAM is fused with the class tokens' attention, and how it is carried
    along that of the patches."""
    name = f"scales {listed(views.scales)}{' + flip' if views.flip else ''}"
    if views.class_attention:
        name += f", times the class tokens' attention to the power of {views.class_attention:g}"
    if not views.attention_steps:
        return name
    blocks, kind = listed(views.attention_blocks), views.attention_kind
    return f"{name}, carried {views.attention_steps} x along the attention of blocks {blocks} ({kind})"


def _named(size: int | None) -> str:
    return "native size" if size is None else f"{size} x {size}"


def listed(scales: Sequence[float]) -> str:
    """Numbers in as few digits as tell them."""
    return ", ".join(f"{scale:g}" for scale in scales)


def _batches(items: Iterator[EvalItem], batch_size: int) -> Iterator[list[EvalItem]]:
    """Neighbours of equal shape together, none across a multiple of `batch_size` (where processes divide the list)."""
    batch: list[EvalItem] = []
    for number, item in enumerate(items):
        if batch and (number % batch_size == 0 or batch[0].image.shape != item.image.shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def evaluate_as(config: TrainConfig, model: ToCo, source, **options: Any) -> Evaluation:
    """`evaluate` on a split with the sizes, scales, precision and attention that `config` trains and validates with;
    `options` are its other arguments."""
    device = model.classifier.weight.device
    configured = {
        "size": eval_size(config),
        "seg_scales": config.seg_scales,
        "max_over_scales": config.release.max_over_scales,
        "autocast": autocast_of(config, device),
        "workers": config.data.workers,
    }
    with attention_of(model, config, device):
        return evaluate(model, source, **configured, **config.labels.cam_options(), **options)
