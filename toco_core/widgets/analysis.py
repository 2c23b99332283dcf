"""One image in one model: set it once (the passes through the encoder), then ask as often as you like.

Everything is computed when it is first asked for, and kept: a pass per scale and mirroring, a map per class, the
attention of all blocks. Moving a threshold afterwards costs a few comparisons per pixel. Classes are the model's here,
1..K.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toco_core import crops
from toco_core.errors import ToCoError
from toco_core.labels import region_mask
from toco_core.predict import image as predict
from toco_core.predict.class_maps import MOST
from toco_core.predict.head import HeadPredictor
from toco_core.predict.image import ImagePredictor
from toco_core.predict.tokens import similarity_map
from toco_core.widgets.settings import Settings
from toco_core.widgets.subjects import AUXILIARY, CLASSIFIER, DECODER, PROJECTION, Subject


class Crop(NamedTuple):
    """A local view and what class token contrast makes of it. Sides are fractions of the image."""

    top: float
    left: float
    height: float
    width: float
    ratio: float  # mean of the region values 0, 1, 2 in it, see `crops.foreground_ratio`
    is_positive: bool
    similarity: float  # cosine of its class token with the image's: student's head and teacher's, where trained


class StrongestClass(NamedTuple):
    """Largest CAM value among the chosen classes and the class that has it, at native size."""

    value: Float[np.ndarray, "H W"]
    label: np.ndarray  # uint8 H W, 1..K; 0 where no class is chosen


class Analysis:
    """One image in one model. `grid` is its patch grid, `predicted` the classes that the model sees in it."""

    def __init__(self, subject: Subject, image: np.ndarray):
        self.subject, self.image = subject, image
        options = {"passes": lambda: subject.lock}
        if subject.head:
            self.predictor = HeadPredictor(subject.head, subject.model, subject.config, **options)
        else:
            self.predictor = ImagePredictor(subject.model, subject.config, **options)
        self.predictor.set_image(image)
        self.size, self.images = self.predictor.size, self.predictor.images
        self.inside, self.grid = self.predictor.inside, self.predictor.grid
        if subject.head:
            self.class_names, self.class_scores = self.predictor.class_names, self.predictor.scores
        else:
            with torch.no_grad(), subject.lock:
                output = subject.model.heads(self.inside.tokens, segmentation=False)
            self.class_names: tuple[str, ...] = subject.class_names  # background first
            self.class_scores: np.ndarray = output.class_logits[0].sigmoid().cpu().numpy()  # K, their probabilities
        self.par_kept: dict = {}  # of `predict.pixel.trace_par`
        self._segmentations: dict[bool, np.ndarray] = {}

    # ---- classes

    @property
    def predicted(self) -> tuple[int, ...]:
        """Classes with a probability above one half; of an ImageNet head the few likely ones, or the likeliest."""
        if CLASSIFIER not in self.subject.has:
            return ()
        if self.subject.head:
            return tuple(k for k in range(1, MOST + 1) if k == 1 or self.class_scores[k - 1] > 0.1)
        return tuple(int(k) + 1 for k in np.flatnonzero(self.class_scores > 0.5))

    # ---- CAM

    def cam(self, settings: Settings, k: int) -> Float[Tensor, "H W"]:
        """CAM of class `k` at the size that the model saw, in [0, 1]. Raises ToCoError where the model has none."""
        return self.predictor.class_cam(k, **self._which(settings))

    def cams(self, settings: Settings, classes: tuple[int, ...]) -> Float[Tensor, "1 k H W"]:
        """The CAMs of some classes, in their order."""
        return self.predictor.cam(classes=classes, **self._which(settings))

    def strongest(self, settings: Settings, classes: tuple[int, ...]) -> StrongestClass:
        """The largest value among the CAMs of `classes`, brought to native size as `evaluate` does."""
        value, label = self.predictor.strongest(classes=classes, **self._which(settings))
        return StrongestClass(value, label.astype(np.uint8))

    # ---- labels, uint8 H W at native size: 0 background, 1..K, 255 uncertain

    def label(self, settings: Settings, classes: tuple[int, ...]) -> np.ndarray:
        """The label that `settings.show` names. Raises ToCoError where the model lacks the head for it."""
        thresholds = {"beta_l": settings.beta_l, "beta_h": settings.beta_h}
        if settings.show in ("image", "CAM", "CAM label"):
            value, label = self.strongest(settings, classes)
            return np.where(value > settings.beta, label, 0).astype(np.uint8)
        if settings.show == "segmentation":
            return self.segmentation(with_crf=settings.crf)
        par = {"iterations": settings.par_iterations, "dilations": settings.par_dilations, "scale": settings.par_scale}
        if settings.show == "vote":
            for head in (CLASSIFIER, AUXILIARY, DECODER):
                self._need(head, "vote")
            views = {"scales": settings.cam_scales, "flip": settings.flip}
            return self.predictor.voted_label(settings.beta, "par", settings=par, classes=classes, **views)
        which = {"classes": classes, **self._which(settings)}
        if settings.show == "seed label":
            return self.predictor.seed_label(thresholds=thresholds, **which)
        if settings.show == "pseudo label":
            return self.predictor.pseudo_label("par", settings=par | thresholds, **which)
        raise ToCoError(f"show = {settings.show!r} is no label of the model")

    def segmentation(self, *, with_crf: bool = False) -> np.ndarray:
        """The decoder's label, optionally through the dense CRF at native size (seconds for a photograph)."""
        self._need(DECODER, "segmentation")
        if with_crf not in self._segmentations:
            self._segmentations[with_crf] = self.predictor.segmentation(crf={} if with_crf else None)
        return self._segmentations[with_crf]

    def has_crf(self) -> bool:
        """Whether the segmentation through the CRF is there already."""
        return True in self._segmentations

    # ---- tokens

    def patch_at(self, y: float, x: float) -> int:
        """Number of the patch at a place, in fractions of the image."""
        h, w = self.grid
        return min(max(int(y * h), 0), h - 1) * w + min(max(int(x * w), 0), w - 1)

    def similarity(self, block: int, patch: int) -> Float[np.ndarray, "h w"]:
        """Cosine similarity of one patch with all, after `block`; the last block's tokens are normed."""
        return self.predictor.similarity(block, patch)

    def similarity_by_block(self, patch: int) -> np.ndarray:
        """Mean similarity of one patch with all others, after each block."""
        means = []
        for block in range(1, len(self.inside.blocks) + 1):
            row = similarity_map(self.predictor.patch_tokens(block), patch)
            means.append(float((row.sum() - row[patch]) / max(len(row) - 1, 1)))
        return np.array(means)

    def attention(self, block: int) -> Float[np.ndarray, "heads h w"]:
        """Attention of the class token to the patches after `block`, in multiples of an even spread."""
        return self.predictor.attention(block)

    # ---- crops

    def sampled(self, settings: Settings, classes: tuple[int, ...]) -> list[tuple[float, float]]:
        """Centres (y, x) of crops drawn as in training, in fractions of the image."""
        region, side = self._region(settings, classes), self._crop_side(settings)
        generator = torch.Generator().manual_seed(settings.crop_seed)
        boxes = crops.sample_crops(region, n_crops=settings.n_crops, crop_size=side, generator=generator)
        H, W = region.shape[1:]
        tops, lefts = boxes.top[0].tolist(), boxes.left[0].tolist()
        return [((top + side / 2) / H, (left + side / 2) / W) for top, left in zip(tops, lefts, strict=True)]

    def crops(self, settings: Settings, classes: tuple[int, ...], centres: list[tuple[float, float]]) -> list[Crop]:
        """What class token contrast makes of crops around these places (moved inside where they stick out).

        The regions are those of the CAM that settings name; training takes the auxiliary one.
        """
        if not centres:
            return []
        model, config, side = self.subject.model, self.subject.config, self._crop_side(settings)
        region = self._region(settings, classes)
        H, W = region.shape[1:]
        top = torch.tensor([[min(max(round(y * H - side / 2), 0), H - side) for y, _ in centres]])
        left = torch.tensor([[min(max(round(x * W - side / 2), 0), W - side) for _, x in centres]])
        double = config.release.foreground_counts_double
        ratio = crops.foreground_ratio(region, top, left, side, foreground_counts_double=double)[0]
        is_positive = ratio > config.crops.positive_threshold
        with torch.no_grad():
            with self.subject.lock:
                local = model.encode(crops.cut_crops(self.images, top, left, side)[0]).class_token
            whole = self.inside.tokens.class_token
            if PROJECTION in self.subject.has:
                local, whole = model.project(local), model.project_ema(whole)
            similarity = F.cosine_similarity(local, whole)
        return [
            Crop(int(t) / H, int(l) / W, side / H, side / W, float(r), bool(p), float(s))
            for t, l, r, p, s in zip(top[0], left[0], ratio, is_positive, similarity, strict=True)
        ]

    # ---- within

    def _which(self, settings: Settings) -> dict:
        """The CAM that settings name, in keywords of `ImagePredictor.cam`. Raises ToCoError where it has none."""
        if CLASSIFIER not in self.subject.has:
            raise ToCoError(no_classifier(self.subject))
        which = {"scales": settings.cam_scales, "flip": settings.flip}
        if settings.cam == "auxiliary":
            self._need(AUXILIARY, "auxiliary CAM")
            return which | {"block": predict.AUXILIARY}
        return which | {"block": settings.block if settings.cam == "block" else None}

    def _need(self, head: str, what: str) -> None:
        if head not in self.subject.has:
            raise ToCoError(f"{self.subject.name} has no trained {head.split(' ', 1)[1]}: no {what}")

    def _crop_side(self, settings: Settings) -> int:
        shorter = min(self.images.shape[-2:])
        if settings.crop_size > shorter:
            raise ToCoError(f"crop_size = {settings.crop_size}: at most {shorter}, the image that the model sees")
        return settings.crop_size

    def _region(self, settings: Settings, classes: tuple[int, ...]) -> Tensor:
        cams = self.cams(settings, classes)
        present = torch.ones(1, len(classes), device=cams.device)
        return region_mask(cams, present, beta_l=settings.beta_l, beta_h=settings.beta_h)


def no_classifier(subject: Subject) -> str:
    """What is told about a plain backbone."""
    return f"{subject.name} has no trained classifier: its tokens and its attention can be seen, CAMs cannot"
