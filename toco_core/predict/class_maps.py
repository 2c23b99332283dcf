"""Where a model sees which class in one photograph, in one line.

    from toco_core import cams
    cams("sheep.jpg")                                   # the run `full` that comes with the package
    cams("sheep.jpg", model="runs/<run>")               # whatever `open_model` takes
    cams("sheep.jpg", model="vit_tiny_patch16_224")     # a timm model with its own ImageNet head, nothing trained

The result holds the maps by the names of their classes, the classifier's probabilities, a label map and a picture,
which a notebook shows.

A run's maps are its CAMs. An ImageNet head reads the class token, not the patches, so its weights make no CAM: there
the map of a class is the relevance of each patch for its score, attention times its gradient, positive parts, carried
through all blocks (Chefer et al., ICCV 2021, equations 5 and 6 there); its square root, because it is steep.
"""

import functools
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor, nn

from toco_core.backbone import SHIPPED, build_timm, load_weights
from toco_core.config import LabelConfig, did_you_mean
from toco_core.data import read_image, to_unit
from toco_core.data.augment import resize
from toco_core.data.files import picture_bytes
from toco_core.errors import ToCoError
from toco_core.labels import pseudo_label
from toco_core.machine.device import resolve_device
from toco_core.machine.precision import passes_of
from toco_core.machine.torchvision_shim import make_importable
from toco_core.machine.writing import write_file
from toco_core.predict.image import ImagePredictor
from toco_core.predict.models import NamedModel, is_model, open_model
from toco_core.runs.packed import MODEL
from toco_core.viz import label_over_image, overlay, titled_row

MOST = 3  # classes that an ImageNet head shows at most
RELEVANCE_THRESHOLDS = {"beta_l": 0.3, "beta_h": 0.5}


class Classifier(NamedTuple):
    """A timm model with its own head; a class has the probability that a softmax over all gives it."""

    name: str
    model: nn.Module
    class_names: tuple[str, ...]
    """Background first, which the head does not know."""


@dataclass(frozen=True)
class ClassMaps:
    """What a model sees in one photograph. Shown by a notebook as a picture."""

    model: str
    image: UInt8[np.ndarray, "H W 3"]
    scores: dict[str, float]
    """Probability of every class, the highest first."""
    maps: dict[str, Float[np.ndarray, "H W"]]
    """Class -> where it is seen, in [0, 1]: the classes that were asked for, else those above the threshold, else the
    most probable one."""
    label: UInt8[np.ndarray, "H W"]
    """0 background, i the i-th of `maps`, 255 uncertain: two thresholds, then PAR. Only classes that were asked for or
    are above the threshold have pixels."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers of `label` stand for."""
        return ("background", *self.maps)

    def picture(self, *, height: int = 300) -> UInt8[np.ndarray, "h w 3"]:
        """The photograph, each map over it, and the label, side by side."""
        width = max(1, round(height * self.image.shape[1] / self.image.shape[0]))
        small, titles = resize(self.image, height, width), [f"{name} {self.scores[name]:.2f}" for name in self.maps]
        maps = [cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA) for values in self.maps.values()]
        overlays = [(255 * overlay(small, values)).round().astype(np.uint8) for values in maps]
        label = cv2.resize(self.label, (width, height), interpolation=cv2.INTER_NEAREST)
        pictures = [small, *overlays, label_over_image(small, label, None, side=max(height, width))]
        return titled_row(pictures, [self.model, *titles, "label"])

    def save(self, path: str | Path) -> Path:
        """Write the picture as PNG or JPEG. Raises ToCoError for another suffix or where it cannot be written."""
        suffix = Path(path).suffix.lower()
        if suffix not in (".png", ".jpg", ".jpeg"):
            raise ToCoError(f"path = {str(path)!r} cannot be written: it ends in .png, .jpg or .jpeg")
        return write_file(path, picture_bytes(self.picture(), suffix))

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            Image.fromarray(self.picture()).save(file, "PNG")
            return file.getvalue()

    def __repr__(self) -> str:
        seen = ", ".join(f"{name} {self.scores[name]:.2f}" for name in self.maps)
        return f"ClassMaps({self.image.shape[0]} x {self.image.shape[1]} by {self.model}: {seen})"


def cams(
    photograph: str | Path | np.ndarray | Image.Image,
    model: str | Path | NamedModel | Classifier = "full",
    *,
    classes: Sequence[str] | str | None = None,
    threshold: float | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
) -> ClassMaps:
    """Show where a model sees which class in a photograph.

    Args:
        photograph: a file, an array (uint8 H W 3, RGB), or a picture of PIL, which is seen as its file would be.
        model: what `open_model` takes, or the name of a timm vision transformer whose weights hold an ImageNet head;
            or one that is open already (`open_model`, `open_classifier`).
        classes: names of those to show; None: those with a probability above `threshold`.
        threshold: None: 0.5 for a run, 0.1 for an ImageNet head, of which the three most probable classes are shown.
        weights: a file for a timm name, in place of a download.

    Raises ToCoError for a photograph, a model or a class that is not there, and for a run whose classifier was not
    trained, as a second network's.
    """
    opened = model if isinstance(model, (NamedModel, Classifier)) else _opened(model, weights, device)
    image = _pixels(photograph)
    multi = isinstance(opened, NamedModel)
    unit, scores, maps_of, labels = (_seen_by_run if multi else _seen_by_head)(opened, image)
    limit = (0.5 if multi else 0.1) if threshold is None else threshold
    if not 0 <= limit <= 1:
        raise ToCoError(f"threshold = {limit} is not allowed: 0 to 1")
    names, order = opened.class_names[1:], np.argsort(-scores, kind="stable")
    if classes is None:
        certain = [int(k) for k in order[: None if multi else MOST] if scores[k] > limit]
    else:
        wanted = [_number(name, names) for name in ([classes] if isinstance(classes, str) else classes)]
        certain = list(dict.fromkeys(wanted))  # one synonym may follow another
    shown = certain or [int(order[0])]
    maps, label = maps_of(shown).float(), np.zeros(image.shape[:2], np.uint8)
    if certain:
        slots = pseudo_label(unit, maps, torch.ones(1, len(shown)), **labels)
        label = F.interpolate(slots[None].float(), size=label.shape, mode="nearest")[0, 0].to(torch.uint8).cpu().numpy()
    native = F.interpolate(maps, size=label.shape, mode="bilinear", align_corners=False)[0].cpu().numpy()
    return ClassMaps(
        opened.name,
        image,
        {names[k]: float(scores[k]) for k in order},
        {names[k]: native[i] for i, k in enumerate(shown)},
        label,
    )


def open_classifier(name: str, *, weights: str | Path | None = None, pretrained: bool = True, device: str = "auto"):
    """A timm vision transformer with its own head, as a `Classifier`.

    Raises ToCoError where there is no such model, its weights cannot be had, or it has no head.
    """
    model = build_timm(name, download=pretrained and weights is None, head=True)
    if weights is not None:
        load_weights(model, weights)
    if not model.num_classes:
        raise ToCoError(f"model = {name!r} has no head that knows classes: choose one that was fine-tuned on ImageNet")
    return Classifier(name, model.to(resolve_device(device)).eval(), ("background", *_head_names(model)))


def _opened(name: str | Path, weights: str | Path | None, device: str) -> NamedModel | Classifier:
    """A model by name; the last two stay open while their files do not change."""
    path = Path(name)
    files = [file for file in (path, path / "checkpoint.pt", path / MODEL) if file.is_file()]
    return _kept(
        str(name), None if weights is None else str(weights), device, tuple(os.stat(f).st_mtime_ns for f in files)
    )


@functools.lru_cache(maxsize=2)
def _kept(name: str, weights: str | None, device: str, _state: tuple) -> NamedModel | Classifier:
    is_path = len(Path(name).parts) > 1 or Path(name).suffix in (".pth", ".pt", ".safetensors")
    if weights is None and (is_model(name) or is_path or name == "full"):
        return open_model(name, device=device)
    if name in SHIPPED or name.startswith("plain_vit"):
        raise ToCoError(f"model = {name!r} has no head that knows classes: give a run, or a timm model of ImageNet")
    return open_classifier(name, weights=weights, device=device)


def _pixels(photograph: str | Path | np.ndarray | Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(photograph, (str, Path)):
        return read_image(photograph)
    pixels = _of_picture(photograph) if isinstance(photograph, Image.Image) else np.asarray(photograph)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ToCoError(f"photograph is {pixels.dtype} {pixels.shape}: uint8 of H x W x 3 is wanted, or a file")
    return np.ascontiguousarray(pixels)


def _of_picture(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Turn a picture of PIL upright and into RGB, as `read_image` does: 16-bit grey keeps its upper byte."""
    if picture.mode in ("I", "F"):
        raise ToCoError(
            f"photograph has mode {picture.mode!r} of PIL, whose range is not known: RGB, L or I;16 is wanted"
        )
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        return np.asarray(picture.convert("RGB"))
    except Exception as error:  # the decoders' errors are of many types, and all of them mean the picture
        raise ToCoError(f"photograph cannot be decoded: {error}") from error


def _number(name: str, names: Sequence[str]) -> int:
    """Place of a class; of ImageNet's names, which are lists of synonyms, one synonym is enough."""
    if name in names:
        return names.index(name)
    found = [k for k, entry in enumerate(names) if name.lower() in [part.strip().lower() for part in entry.split(",")]]
    if not found:
        near = did_you_mean(name, names, None if len(names) <= 100 else f": it is none of the {len(names)}")
        raise ToCoError(f"there is no class {name!r}{near}")
    return found[0]


class _ImageView(NamedTuple):
    """An image in a model; classes count from 0."""

    unit: Float[Tensor, "1 3 H W"]
    """As the model saw it, in [0, 1]."""
    scores: Float[np.ndarray, " K"]
    maps_of: Callable[[list[int]], Tensor]
    """Classes -> their maps, 1 k H W."""
    labels: dict
    """Keywords of `labels.pseudo_label`."""


def _seen_by_run(opened: NamedModel, image: np.ndarray) -> _ImageView:
    if not opened.config.loss.cls:
        raise ToCoError(
            f"model = {opened.name!r} has no trained classifier (cls = 0), so there are no CAMs: "
            "`toco label --method seg` writes its segmentation"
        )
    predictor = ImagePredictor(opened.model, opened.config, passes=passes_of(opened.model, opened.config))
    predictor.set_image(image)
    labels = opened.config.labels.pseudo_label_options()
    return _ImageView(
        predictor.unit, predictor.class_scores(), lambda shown: predictor.cam(classes=[k + 1 for k in shown]), labels
    )


@torch.no_grad()
def _seen_by_head(opened: Classifier, image: np.ndarray) -> _ImageView:
    model, side = opened.model, opened.model.pretrained_cfg["input_size"][-1]
    pixels = torch.from_numpy(resize(image, side, side)).permute(2, 0, 1)[None]
    unit = to_unit(pixels.to(next(model.parameters()).device))
    mean, std = (torch.tensor(model.pretrained_cfg[key], device=unit.device).view(3, 1, 1) for key in ("mean", "std"))
    images = (unit - mean) / std
    scores = model(images)[0].float().softmax(0).cpu().numpy()
    labels = LabelConfig().pseudo_label_options() | RELEVANCE_THRESHOLDS
    return _ImageView(unit, scores, lambda shown: relevance_maps(model, images, shown), labels)


def relevance_maps(vit: nn.Module, images: Float[Tensor, "1 3 H W"], classes: Sequence[int]) -> Tensor:
    """1 k H W: the square root of `relevance` at the images' size."""
    maps = relevance(vit, images, classes).clamp(min=0).sqrt()[None]
    return F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)


def relevance(vit: nn.Module, images: Float[Tensor, "1 3 H W"], classes: Sequence[int]) -> Float[Tensor, "k h w"]:
    """Relevance of each patch for the scores of some classes, in [0, 1], the largest of each class being 1.

    With A_l the attention of block l and s the score of a class, R starts as the identity and becomes R + M_l R, where
    M_l is the mean over heads of (A_l * ds/dA_l), positive parts. The patches' columns of the class token's row of R
    are the map; of a model that pools its patches, their mean over the patches' rows.
    """
    attentions, hooks, fused = [], [], [block.attn.fused_attn for block in vit.blocks]
    try:
        for block in vit.blocks:
            block.attn.fused_attn = False
            hooks.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, args: attentions.append(args[0])))
        with torch.enable_grad():
            scores = vit(images.detach().requires_grad_())
            gradients = [torch.autograd.grad(scores[0, k], attentions, retain_graph=True) for k in classes]
    finally:
        for hook in hooks:
            hook.remove()
        for block, before in zip(vit.blocks, fused, strict=True):
            block.attn.fused_attn = before
    n_prefix, maps = vit.num_prefix_tokens, []
    side = vit.patch_embed.patch_size
    grid = images.shape[-2] // side[0], images.shape[-1] // side[1]
    for gradient in gradients:
        total = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=images.device)
        for attention, slope in zip(attentions, gradient, strict=True):
            total = total + (attention.detach() * slope).clamp(min=0).mean(1)[0] @ total
        row = total[0, n_prefix:] if vit.global_pool == "token" else total[n_prefix:, n_prefix:].mean(0)
        maps.append((row / row.max().clamp(min=1e-12)).unflatten(0, grid))
    return torch.stack(maps)


def _head_names(model: nn.Module) -> list[str]:
    make_importable()
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f"class {k}" for k in range(1, model.num_classes + 1)]
    info = ImageNetInfo(subset)
    return _distinct([info.index_to_description(k) for k in range(model.num_classes)])


def _distinct(names: list[str]) -> list[str]:
    """ImageNet has two cranes and two maillots: the later one gets its number."""
    seen: set[str] = set()
    distinct = []
    for k, name in enumerate(names):
        distinct.append(f"{name} ({k})" if name in seen else name)
        seen.add(name)
    return distinct
