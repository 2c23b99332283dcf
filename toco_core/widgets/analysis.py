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
from toco_core.cam import class_activation, normalise_cam, scaled
from toco_core.conventions import IGNORE
from toco_core.data import evaluation_items, to_unit
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import eval_size
from toco_core.labels import pseudo_label, region_mask, seed_label, upsampled_argmax
from toco_core.model import Inside
from toco_core.predict.tokens import class_token_attention_by_block, similarity_map
from toco_core.refiners.crf import dense_crf
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


class Seen(NamedTuple):
    """Largest CAM value among the chosen classes and the class that has it, at native size."""

    value: Float[np.ndarray, "H W"]
    label: np.ndarray  # uint8 H W, 1..K; 0 where no class is chosen


class Analysis:
    """One image in one model. `grid` is its patch grid, `predicted` the classes that the model sees in it."""

    def __init__(self, subject: Subject, image: np.ndarray):
        self.subject, self.image = subject, image
        self.size: tuple[int, int] = image.shape[:2]
        model, device = subject.model, subject.model.classifier.weight.device
        item = next(evaluation_items(_OneImage(image), size=eval_size(subject.config)))
        self.unit = to_unit(item.image.to(device))
        self.images = model.normalise(self.unit)
        with torch.no_grad(), subject.lock:
            self.inside: Inside = model.inside(self.images)
            output = model.heads(self.inside.tokens, segmentation=DECODER in subject.has)
        self.grid: tuple[int, int] = self.inside.tokens.grid
        self.seg_logits = output.seg_logits
        self.class_scores: np.ndarray = output.class_logits[0].sigmoid().cpu().numpy()  # K, probability of each class
        self._raw = {(1.0, False): self._activations(self.inside)}
        self._maps: dict = {}
        self._attention: list[Tensor] | None = None

    # ---- classes

    @property
    def predicted(self) -> tuple[int, ...]:
        """Classes with a probability above one half."""
        if CLASSIFIER not in self.subject.has:
            return ()
        return tuple(int(k) + 1 for k in np.flatnonzero(self.class_scores > 0.5))

    # ---- CAM

    def cam(self, settings: Settings, k: int) -> Float[Tensor, "H W"]:
        """CAM of class `k` at the size that the model saw, in [0, 1]. Raises ToCoError where the model has none."""
        row = self._row(settings)
        key = (row, k, settings.cam_scales, settings.flip)
        if key not in self._maps:
            total = torch.zeros(self.images.shape[-2:], device=self.images.device)
            for scale in settings.cam_scales:
                parts = [self._resized(scale, False, row, k)]
                if settings.flip:
                    parts.append(self._resized(scale, True, row, k))
                total += torch.stack(parts).amax(0).relu_()
            self._maps[key] = normalise_cam(total[None])[0]
        return self._maps[key]

    def cams(self, settings: Settings, classes: tuple[int, ...]) -> Float[Tensor, "1 k H W"]:
        """The CAMs of some classes, in their order."""
        self._row(settings)  # tells what is missing, also where no class is chosen
        if not classes:
            return torch.zeros(1, 0, *self.images.shape[-2:], device=self.images.device)
        return torch.stack([self.cam(settings, k) for k in classes])[None]

    def strongest(self, settings: Settings, classes: tuple[int, ...]) -> Seen:
        """The largest value among the CAMs of `classes`, brought to native size as `evaluate` does."""
        key = ("strongest", self._row(settings), classes, settings.cam_scales, settings.flip)
        if key not in self._maps:
            if classes:
                value, slot = _native(self.cams(settings, classes), self.size)[0].max(0)
                label = np.array(classes, np.uint8)[slot.cpu().numpy()]
                self._maps[key] = Seen(value.cpu().numpy(), label)
            else:
                self._maps[key] = Seen(np.zeros(self.size, np.float32), np.zeros(self.size, np.uint8))
        return self._maps[key]

    # ---- labels, uint8 H W at native size: 0 background, 1..K, 255 uncertain

    def label(self, settings: Settings, classes: tuple[int, ...]) -> np.ndarray:
        """The label that `settings.show` names. Raises ToCoError where the model lacks the head for it."""
        thresholds = {"beta_l": settings.beta_l, "beta_h": settings.beta_h}
        if settings.show in ("image", "CAM", "CAM label"):
            value, label = self.strongest(settings, classes)
            return np.where(value > settings.beta, label, 0).astype(np.uint8)
        if settings.show == "segmentation":
            return self.segmentation(with_crf=settings.crf)
        cams = self.cams(settings, classes)
        present = torch.ones(1, len(classes), device=cams.device)
        if settings.show == "seed label":
            slots = seed_label(cams, present, **thresholds)
        elif settings.show == "pseudo label":
            par = {"iterations": settings.par_iterations, "dilations": settings.par_dilations}
            slots = pseudo_label(self.unit, cams, present, scale=settings.par_scale, **par, **thresholds)
        else:
            raise ToCoError(f"show = {settings.show!r} is no label of the model")
        table = np.zeros(256, np.uint8)
        table[1 : len(classes) + 1], table[IGNORE] = classes, IGNORE
        label = F.interpolate(slots[None].float(), size=self.size, mode="nearest")[0, 0]
        return table[label.to(torch.uint8).cpu().numpy()]

    def segmentation(self, *, with_crf: bool = False) -> np.ndarray:
        """The decoder's label, optionally through the dense CRF at native size (seconds for a photograph)."""
        self._need(DECODER, "segmentation")
        if not with_crf:
            return upsampled_argmax(self.seg_logits.float(), self.size)[0].to(torch.uint8).cpu().numpy()
        if ("crf",) not in self._maps:
            probs = _native(self.seg_logits.float(), self.size)[0].softmax(0)
            image = torch.from_numpy(self.image).permute(2, 0, 1).float().to(probs.device) / 255
            self._maps[("crf",)] = dense_crf(probs, image).argmax(0).to(torch.uint8).cpu().numpy()
        return self._maps[("crf",)]

    def has_crf(self) -> bool:
        """Whether the segmentation through the CRF is there already."""
        return ("crf",) in self._maps

    # ---- tokens

    def patch_at(self, y: float, x: float) -> int:
        """Number of the patch at a place, in fractions of the image."""
        h, w = self.grid
        return min(max(int(y * h), 0), h - 1) * w + min(max(int(x * w), 0), w - 1)

    def similarity(self, block: int, patch: int) -> Float[np.ndarray, "h w"]:
        """Cosine similarity of one patch with all, after `block`; the last block's tokens are normed."""
        return similarity_map(self._tokens(block), patch).cpu().numpy().reshape(self.grid)

    def similarity_by_block(self, patch: int) -> np.ndarray:
        """Mean similarity of one patch with all others, after each block."""
        means = []
        for block in range(1, len(self.inside.blocks) + 1):
            row = similarity_map(self._tokens(block), patch)
            means.append(float((row.sum() - row[patch]) / max(len(row) - 1, 1)))
        return np.array(means)

    def attention(self, block: int) -> Float[np.ndarray, "heads h w"]:
        """Attention of the class token to the patches after `block`, in multiples of an even spread."""
        if self._attention is None:
            with self.subject.lock:
                self._attention = class_token_attention_by_block(self.subject.model, self.images)
        heads = self._attention[self._checked(block) - 1][0]
        return (heads * heads.shape[1]).cpu().numpy().reshape(len(heads), *self.grid)

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

    def _row(self, settings: Settings) -> int:
        """Row of the raw activations: blocks from 0, the auxiliary CAM last."""
        if CLASSIFIER not in self.subject.has:
            raise ToCoError(no_classifier(self.subject))
        if settings.cam == "auxiliary":
            self._need(AUXILIARY, "auxiliary CAM")
            return len(self.inside.blocks)
        if settings.cam == "block":
            return self._checked(settings.block) - 1
        return len(self.inside.blocks) - 1

    def _need(self, head: str, what: str) -> None:
        if head not in self.subject.has:
            raise ToCoError(f"{self.subject.name} has no trained {head.split(' ', 1)[1]}: no {what}")

    def _checked(self, block: int) -> int:
        depth = len(self.inside.blocks)
        if not 1 <= block <= depth:
            raise ToCoError(f"block = {block} is not allowed: {self.subject.name} has blocks 1..{depth}")
        return block

    def _tokens(self, block: int) -> Tensor:
        blocks = self.inside.blocks
        return self.inside.normed[-1][0] if self._checked(block) == len(blocks) else blocks[block - 1][0]

    def _activations(self, inside: Inside) -> Float[Tensor, "R K h w"]:
        """Raw activations of all classes: after each block through norm and classifier, then the auxiliary ones."""
        model, grid = self.subject.model, inside.tokens.grid
        maps = [tokens.transpose(1, 2).unflatten(2, grid) for tokens in inside.normed]
        with torch.no_grad():
            rows = [class_activation(m, model.classifier.weight)[0] for m in maps]
            rows.append(class_activation(inside.tokens.aux_patch_map, model.aux_classifier.weight)[0])
        return torch.stack(rows)

    def _resized(self, scale: float, mirrored: bool, row: int, k: int) -> Tensor:
        """Raw activation of one class from one pass, at the size that the model saw, turned back."""
        if (scale, mirrored) not in self._raw:
            model = self.subject.model
            with torch.no_grad(), self.subject.lock:
                views = scaled(model, self.images, scale)
                self._raw[scale, mirrored] = self._activations(model.inside(views.flip(-1) if mirrored else views))
        raw = self._raw[scale, mirrored][row, k - 1][None, None]
        raw = F.interpolate(raw, size=self.images.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
        return raw.flip(-1) if mirrored else raw

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


class _OneImage:
    """An image alone as a source of the loader, which brings it to size."""

    names, image_labels = ("image",), np.zeros((1, 1), np.uint8)

    def __init__(self, image: np.ndarray):
        self._image = image

    def __len__(self) -> int:
        return 1

    def image(self, index: int) -> np.ndarray:
        return self._image

    def mask(self, index: int) -> None:
        return None


def _native(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)
