"""One image in one model: set it once, then ask for every map and label.

    predictor = ImagePredictor(model, config)
    predictor.set_image(image, image_labels)
    predictor.cam(), predictor.cam(block=9), predictor.cam(auxiliary=True)
    predictor.seed_label(), predictor.pseudo_label(), predictor.pseudo_label("crf"), predictor.segmentation()
    predictor.vote(), predictor.voted_label()
    predictor.similarity(block=12, patch=40), predictor.attention(block=12)

Whatever makes a label map of an image asks it: `look`, `evaluation.protocols`, `predict.export`, the widgets. Each pass
through the encoder, each class's map and the attention are computed when first asked for, and kept until the next
image. Sizes, scales, thresholds and the refiner are those of the config.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from toco_core.cam import class_activation, fused, normalise_cam, scaled
from toco_core.config import TrainConfig
from toco_core.conventions import IGNORE, classes_in
from toco_core.data import EvalItem, evaluation_items, to_unit
from toco_core.data.loader import eval_item
from toco_core.errors import ToCoError
from toco_core.labels import merged_logits, pseudo_label, refined_labels, seed_label, valid_cam
from toco_core.model import BlockTokens, ToCo
from toco_core.par import full_precision
from toco_core.predict.segmentation import crf_label, merged_label, segmentation_maps
from toco_core.predict.tokens import class_token_attention_by_block, similarity_map
from toco_core.refiners.attention import carried, walk
from toco_core.runs.folder import weights_hash

AUXILIARY = 0  # the auxiliary CAM where a block's number from 1 is expected


class NotFinite(ToCoError):
    """What a network gives is no number, which is no fault of the image."""


class ImagePredictor:
    """A model and a config; `set_image` or `set_item` give it an image.

    `passes` returns the context of each pass through the network: precision, kernels, a lock. It is never entered
    twice at once.

    Raises NotFinite where scores, activations or segmentations that it is asked for are NaN or infinite.
    """

    def __init__(self, model: ToCo, config: TrainConfig, *, passes: Callable = contextlib.nullcontext):
        self.model, self.config, self.passes = model, config, passes

    def set_image(self, image: UInt8[np.ndarray, "H W 3"], image_labels: Sequence[int] | None = None) -> None:
        """Set an image of any size. `image_labels`: K values 0 or 1; None: no class, name them when asking.

        Raises ToCoError for another number of values.
        """
        K = self.model.n_classes
        labels = torch.zeros(K) if image_labels is None else torch.tensor(image_labels).float()
        if labels.shape != (K,):
            raise ToCoError(f"image_labels of shape {tuple(labels.shape)} is not allowed: {K} values, one per class")
        side = eval_size(self.config)
        size = None if side is None else (side, side)
        self.set_item(eval_item("image", image, None, labels[None], size=size, native=True))

    def set_item(self, item: EvalItem) -> None:
        """Set an image as `data.evaluation_items` gives it, with `native=True`."""
        weight = self.model.classifier.weight
        self.native: UInt8[Tensor, "1 3 nh nw"] = item.native
        self.size: tuple[int, int] = tuple(item.native.shape[-2:])
        self.unit: Float[Tensor, "1 3 H W"] = to_unit(item.image).to(weight.device)
        self.images = self.model.normalise(self.unit)
        present = torch.nonzero(item.image_labels[0])[:, 0]
        self.labelled: tuple[int, ...] = tuple(int(k) + 1 for k in present)
        self._passes: dict[tuple[float, bool], BlockTokens] = {}
        self._kept: dict = {}

    def class_scores(self) -> Float[np.ndarray, " K"]:
        """The classifier's probability of each class."""
        with torch.no_grad(), self.passes():
            logits = _finite(self.model.heads(self.inside.tokens, segmentation=False).class_logits)
        return logits[0].float().sigmoid().cpu().numpy()

    # ---- maps

    @property
    def inside(self) -> BlockTokens:
        """The pass over the image as it is: tokens after every block."""
        return self._pass(1.0, False, False)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        return self.inside.tokens.grid

    def class_cam(
        self, k: int, *, block: int | None = None, scales: Sequence[float] | None = None, flip: bool = True
    ) -> Float[Tensor, "H W"]:
        """CAM of class `k` (1..K) in [0, 1], at the size that the model saw.

        `block`: the tokens after this block (from 1) through final norm and classifier; None: the last; `AUXILIARY`:
        the auxiliary CAM. `scales`: None for the config's. Raises ToCoError for a class or a block that is not
        there.
        """
        self._classes([k])
        row = self.model.depth if block is None else block
        if row != AUXILIARY:
            self._checked(row)
        scales = tuple(self.config.labels.cam_scales if scales is None else scales)
        key = ("cam", row, k, scales, flip)
        if key not in self._kept:
            total = torch.zeros(self.images.shape[-2:], device=self.images.device)
            for scale in scales:
                views = (False, True) if flip else (False,)
                parts = [self._resized(scale, mirrored, flip, row, k) for mirrored in views]
                total = total + torch.stack(parts).amax(0).relu_()
            self._kept[key] = normalise_cam(total[None])[0]
        return self._kept[key]

    def cam(
        self,
        *,
        classes: Sequence[int] | None = None,
        block: int | None = None,
        auxiliary: bool = False,
        scales: Sequence[float] | None = None,
        flip: bool = True,
    ) -> Float[Tensor, "1 k H W"]:
        """CAMs of some classes (1..K; None: the labelled ones) in their order; arguments as in `class_cam`."""
        classes, block = self._classes(classes), AUXILIARY if auxiliary else block
        if not classes:
            return self.images.new_zeros(1, 0, *self.images.shape[-2:])
        return torch.stack([self.class_cam(k, block=block, scales=scales, flip=flip) for k in classes])[None]

    def strongest(
        self, *, classes: Sequence[int] | None = None, **which
    ) -> tuple[Float[np.ndarray, "nh nw"], Int[np.ndarray, "nh nw"]]:
        """The largest CAM value at native size and its class, 1..K (0 without any class); `which` as in `cam`."""
        classes = self._classes(classes)
        key = ("strongest", classes, tuple(sorted(which.items())))
        if key not in self._kept:
            value, slot = strongest(self.cam(classes=classes, **which), torch.ones(1, len(classes)), self.size)
            self._kept[key] = value, np.array([0, *classes])[slot]
        return self._kept[key]

    def probabilities(
        self, *, classes: Sequence[int] | None = None, scales: Sequence[float] | None = None, flip: bool = True
    ) -> Float[Tensor, "1 k H W"]:
        """The decoder's probabilities of some classes (None: the labelled ones), as if an image showed nothing but them
        and the background.

        Softmax over these of the mean of its logits over the views of a CAM, scales and mirror images.
        """
        classes = self._classes(classes)
        scales = tuple(self.config.labels.cam_scales if scales is None else scales)
        key = ("probabilities", classes, scales, flip)
        if key not in self._kept:
            views = []
            for scale in scales:
                for mirrored in (False, True) if flip else (False,):
                    tokens = self._pass(float(scale), mirrored, flip).tokens
                    with torch.no_grad(), self.passes():
                        logits = _finite(self.model.decoder(tokens.patch_map))[:, [0, *classes]]
                    size = self.images.shape[-2:]
                    logits = F.interpolate(full_precision(logits), size=size, mode="bilinear", align_corners=False)
                    views.append(logits.flip(-1) if mirrored else logits)
            self._kept[key] = torch.stack(views).mean(0).softmax(1)[:, 1:]
        return self._kept[key]

    def vote(self, *, classes: Sequence[int] | None = None, **views) -> Float[Tensor, "1 k H W"]:
        """The mean of the final CAM, the auxiliary CAM and the decoder's `probabilities`, in [0, 1]: three heads that
        err in different places. `views` are `scales` and `flip`."""
        of = {"classes": self._classes(classes), **views}
        return torch.stack([self.cam(**of), self.cam(**of, auxiliary=True), self.probabilities(**of)]).mean(0)

    def similarity(self, block: int, patch: int) -> Float[np.ndarray, "h w"]:
        """Cosine similarity of one patch token with all after `block`; the last block's tokens are normed."""
        return similarity_map(self.patch_tokens(block), patch).cpu().numpy().reshape(self.grid)

    def attention(self, block: int) -> Float[np.ndarray, "heads h w"]:
        """Attention of the class token to the patches in `block`, in multiples of an even spread."""
        if "attention" not in self._kept:
            with self.passes():
                self._kept["attention"] = class_token_attention_by_block(self.model, self.images)
        heads = full_precision(self._kept["attention"][self._checked(block) - 1][0])
        return (heads * heads.shape[1]).cpu().numpy().reshape(len(heads), *self.grid)

    def patch_tokens(self, block: int) -> Float[Tensor, "N D"]:
        """After `block`; those of the last block are normed."""
        inside = self.inside
        return inside.normed[-1][0] if self._checked(block) == self.model.depth else inside.blocks[block - 1][0]

    # ---- labels, uint8 at native size: 0 background, 1..K, 255 uncertain

    def cam_label(self, beta: float, **which) -> UInt8[np.ndarray, "nh nw"]:
        """One threshold: the strongest class where its CAM is above `beta`; `which` as in `cam`."""
        value, label = self.strongest(**which)
        return np.where(value > np.float32(beta), label, 0).astype(np.uint8)

    def seed_label(
        self, *, thresholds: Mapping | None = None, classes: Sequence[int] | None = None, **which
    ) -> UInt8[np.ndarray, "nh nw"]:
        """Two thresholds (`beta_l`, `beta_h`; None: the config's), 255 between them; `which` as in `cam`."""
        classes, thresholds = self._classes(classes), thresholds or self.config.labels.thresholds()
        cam = self.cam(classes=classes, **which)
        return self._native(seed_label(cam, torch.ones(1, len(classes)), **thresholds), classes)

    def pseudo_label(
        self,
        refiner: str | None = None,
        *,
        settings: Mapping | None = None,
        classes: Sequence[int] | None = None,
        **which,
    ) -> UInt8[np.ndarray, "nh nw"]:
        """The same, refined. `refiner`: None for the config's; `settings`: other keywords of `labels.pseudo_label`."""
        classes = self._classes(classes)
        options = self.config.labels.pseudo_label_options(refiner) | dict(settings or {})
        cam = self.cam(classes=classes, **which)
        return self._native(pseudo_label(self.unit, cam, torch.ones(1, len(classes)), **options), classes)

    def refined_label(
        self, beta: float, refiner: str | None = None, *, classes: Sequence[int] | None = None, **which
    ) -> UInt8[np.ndarray, "nh nw"]:
        """The CAM refined against one background score, so that nothing is open; `refiner`: None for the config's."""
        classes = self._classes(classes)
        return self._refined(self.cam(classes=classes, **which), classes, beta, refiner)

    def voted_label(
        self,
        beta: float | None = None,
        refiner: str | None = None,
        *,
        settings: Mapping | None = None,
        classes: Sequence[int] | None = None,
        **views,
    ) -> UInt8[np.ndarray, "nh nw"]:
        """`vote` refined against one background score, so that nothing is open.

        None for the config's `beta` and refiner; `settings`: other keywords of the refiner; `views` as in `vote`.
        """
        classes, beta = self._classes(classes), self.config.labels.beta if beta is None else beta
        return self._refined(self.vote(classes=classes, **views), classes, beta, refiner, settings)

    def segmentation(
        self, *, scales: Sequence[float] = (1.0,), crf: Mapping | None = None
    ) -> UInt8[np.ndarray, "nh nw"]:
        """The decoder's label: one pass at scale 1, or merged over mirrored `scales`; `crf`: the settings of a dense
        CRF at native size."""
        use_max = self.config.release.max_over_scales
        if tuple(scales) == (1.0,):
            maps = [self.seg_logits]
        else:
            with torch.no_grad(), self.passes():
                maps = [_finite(part) for part in segmentation_maps(self.model, self.images, scales)]
        if crf is None:
            label = merged_label(maps, self.size, max_over_scales=use_max)
        else:
            logits = merged_logits(maps, self.size, max_over_scales=use_max)
            label = crf_label(logits, to_unit(self.native).to(logits), crf)
        return label[0].to(torch.uint8).cpu().numpy()

    @property
    def seg_logits(self) -> Float[Tensor, "1 C h w"]:
        """Of the decoder, at the patch grid."""
        if "seg_logits" not in self._kept:
            tokens = self.inside.tokens
            with torch.no_grad(), self.passes():
                self._kept["seg_logits"] = _finite(self.model.decoder(tokens.patch_map).contiguous())
        return self._kept["seg_logits"]

    # ---- within

    def _refined(
        self,
        maps: Float[Tensor, "1 k H W"],
        classes: Sequence[int],
        beta: float,
        refiner: str | None,
        settings: Mapping | None = None,
    ) -> UInt8[np.ndarray, "nh nw"]:
        options = self.config.labels.refiner_options(refiner) | dict(settings or {})
        (label,) = refined_labels(self.unit, maps, torch.ones(1, len(classes)), betas=[beta], **options)
        return self._native(label, classes)

    def _classes(self, classes: Sequence[int] | None) -> tuple[int, ...]:
        if classes is None:
            return self.labelled
        for k in classes:
            if not 1 <= k <= self.model.n_classes:
                raise ToCoError(f"class = {k} is not allowed: the model has 1..{self.model.n_classes}")
        return tuple(classes)

    def _checked(self, block: int) -> int:
        if not 1 <= block <= self.model.depth:
            raise ToCoError(f"block = {block} is not allowed: {self.model.config.backbone} has 1..{self.model.depth}")
        return block

    def _pass(self, scale: float, mirrored: bool, flip: bool) -> BlockTokens:
        """One view; scaled views and their mirrors go together, as in `multi_scale_cam`."""
        if (scale, mirrored) not in self._passes:
            labels = self.config.labels
            options: dict[str, Any] = {"attend": labels.attended(), "classes": labels.class_attention > 0}
            with torch.no_grad(), self.passes():
                views = scaled(self.model, self.images, scale)
                if flip and scale != 1:
                    both = self.model.inside(torch.cat([views, views.flip(-1)]), **options)
                    self._passes[scale, False], self._passes[scale, True] = both.images()
                else:
                    views = views.flip(-1) if mirrored else views
                    self._passes[scale, mirrored] = self.model.inside(views, **options)
        return self._passes[scale, mirrored]

    def _activation(self, scale: float, mirrored: bool, flip: bool, row: int) -> Float[Tensor, "1 K h w"]:
        """Raw activations of all classes from one view, fused with its class tokens' attention and carried along
        its own where the config says so."""
        key = ("raw", scale, mirrored, row)
        if key not in self._kept:
            model, labels, inner = self.model, self.config.labels, row not in (AUXILIARY, self.model.depth)
            inside = self._pass(scale, mirrored, flip)
            head = model.classifier if row != AUXILIARY else model.aux_classifier
            if row == AUXILIARY:
                patch_map = inside.tokens.aux_patch_map
            elif not inner:
                patch_map = inside.tokens.patch_map
            else:
                patch_map = inside.normed[row - 1].transpose(1, 2).unflatten(2, inside.tokens.grid)
            with torch.no_grad(), torch.autocast(patch_map.device.type, enabled=False):
                raw = class_activation(patch_map.to(head.weight.dtype), head.weight)
                if labels.class_attention:
                    raw = fused(raw, inside.tokens.class_attention, labels.class_attention)
                if labels.attention_steps:
                    affinity = walk(inside.tokens, labels.attention_kind)
                    raw = carried(raw, affinity, labels.attention_steps).to(raw.dtype)
            self._kept[key] = _finite(raw)
        return self._kept[key]

    def _resized(self, scale: float, mirrored: bool, flip: bool, row: int, k: int) -> Float[Tensor, "H W"]:
        """Raw activation of one class at the size that the model saw, turned back."""
        raw = self._activation(scale, mirrored, flip, row)[:, k - 1 : k]
        raw = F.interpolate(raw, size=self.images.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
        return raw.flip(-1) if mirrored else raw

    def _native(self, slots: Int[Tensor, "1 H W"], classes: Sequence[int]) -> UInt8[np.ndarray, "nh nw"]:
        """Labels 0..k as classes 0..K (255 stays), at native size (nearest pixel)."""
        table = np.zeros(IGNORE + 1, np.uint8)
        table[1 : len(classes) + 1], table[IGNORE] = classes, IGNORE
        label = F.interpolate(slots[None].float(), size=self.size, mode="nearest")[0, 0]
        return table[label.to(torch.uint8).cpu().numpy()]


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise NotFinite(
            "the network gives NaN or infinite scores: finite ones are wanted, of weights that are undamaged or with "
            "precision = 'fp32'"
        )
    return values


class ImagePrediction(NamedTuple):
    """Everything about one image, at its native size."""

    name: str
    image: np.ndarray  # uint8 H W 3
    mask: np.ndarray | None  # uint8 H W
    classes: tuple[int, ...]  # the labelled classes, 1..K
    cam: np.ndarray  # largest value among labelled classes, H W in [0, 1]
    aux_cam: np.ndarray
    seed_label: np.ndarray  # two thresholds on the final CAM, 0..K, 255 between them
    pseudo_label: np.ndarray  # the same after PAR
    segmentation: np.ndarray  # the decoder's labels

    @property
    def drawn(self) -> list[int]:
        """The classes, 1..K, that one of its label maps shows, be they of the image or not."""
        maps = [self.seed_label, self.pseudo_label, self.segmentation]
        return classes_in(*maps, *([] if self.mask is None else [self.mask]))


def look(model: ToCo, source, index: int, config: TrainConfig) -> ImagePrediction:
    """CAMs, labels and segmentation of image `index` of a split, by the sizes, scales and thresholds of `config`."""
    predictor = ImagePredictor(model, config)
    item = next(evaluation_items(source.subset([index]), size=eval_size(config), native=True))
    predictor.set_item(item)
    return ImagePrediction(
        name=item.name,
        image=source.image(index),
        mask=item.mask,
        classes=predictor.labelled,
        cam=predictor.strongest()[0],
        aux_cam=predictor.strongest(auxiliary=True)[0],
        seed_label=predictor.seed_label(),
        pseudo_label=predictor.pseudo_label(),
        segmentation=predictor.segmentation(),
    )


def eval_size(config: TrainConfig) -> int | None:
    """Side of the square at which images are evaluated; None: native size."""
    return config.data.crop_size if config.release.square_evaluation else None


def computed_by(model: ToCo) -> dict:
    """What all maps of a model depend on besides a config's sizes and scales: device, precision in the context of this
    call, network and weights, as JSON holds it."""
    device, precision = model.classifier.weight.device.type, model.classifier.weight.dtype
    if torch.is_autocast_enabled(device):
        precision = torch.get_autocast_dtype(device)
    named, products = str(precision).removeprefix("torch."), torch.get_float32_matmul_precision()
    fields = ("backbone", "layer", "aux_norm", "pooling", "pos_embed_antialias")
    network = {name: getattr(model.config, name) for name in fields}
    if model.config.aux_pooling:  # a later field: numbers kept before it are still those of today
        network["aux_pooling"] = model.config.aux_pooling
    if model.config.class_tokens_after:
        network["class_tokens_after"] = model.config.class_tokens_after
    network |= {"dropped_border": model.dropped_border, "mean": model.mean.tolist(), "std": model.std.tolist()}
    return {
        "device": device,
        "precision": named if products == "highest" else f"{named}, products {products}",
        "network": network,
        "decoder_dilation": model.config.decoder_dilation,
        "weights": weights_hash(model),
    }


def strongest(cam: Tensor, image_labels: Tensor, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of one image's CAM (1 K H W): its largest value among labelled classes at `size`, and that class, 1..K."""
    present = torch.nonzero(image_labels[0])[:, 0]
    if not len(present):
        return np.zeros(size, np.float32), np.zeros(size, np.int64)
    maps = valid_cam(cam, image_labels)[:, present]
    maps = F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)[0]
    value, slot = maps.max(0)
    return value.cpu().numpy(), (present[slot] + 1).cpu().numpy()
