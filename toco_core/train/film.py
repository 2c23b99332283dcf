"""A training as a film: what a few validation images light up, kept in small pictures while it trains.

    train(config, film=20)                       # a frame before the first step, after every 20th, and after the last
    toco film runs/<run> training.gif

    <run>/film/film.json         the images: names, places in the pictures, class names
    <run>/film/images.png        the images side by side, small
    <run>/film/00000040.png      after step 40: red the largest CAM of the labelled classes (0 to 255), green its class,
                                 blue the decoder's class

A frame reads the weights and draws no random number: no bit of the training changes. Frames that an interrupted run
took after its last checkpoint are taken again, with the same bits.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import UInt8

from toco_core.config import TrainConfig
from toco_core.data import EvalItem, Split, evaluation_items
from toco_core.data.files import image_size, picture_bytes, read_image
from toco_core.errors import ToCoError, refuse_other
from toco_core.machine.intake import read_json
from toco_core.machine.precision import passes_of
from toco_core.machine.writing import write_whole, writing
from toco_core.model import ToCo
from toco_core.predict.image import ImagePredictor, eval_size
from toco_core.runs.folder import Run
from toco_core.viz.pictures import label_over_image, overlay

IMAGES = 4  # validation images with a label, evenly spaced over the split
SIDE = 128  # their longer side, pixels
FOLDER = "film"
SHOWN = ("CAM", "segmentation")


class Film:
    """The camera: `take(model, step)` keeps a frame of a model that has learned for `step` steps."""

    def __init__(self, run: Run, source: Split, config: TrainConfig, *, every: int):
        """`every`: steps between two frames; 0: no frame at all."""
        self.folder, self.config, self.every = run.folder / FOLDER, config, every
        self._source, self._items = source, None

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether a frame belongs after so many steps."""
        return bool(self.every) and (last or step % self.every == 0)

    def has(self, step: int) -> bool:
        """Whether it was taken."""
        return self._path(step).is_file()

    def take(self, model: ToCo, step: int) -> None:
        """Keep a frame. The model's mode is restored. Raises ToCoError where it cannot be written."""
        with model.evaluating():
            frames = [_frame(model, item, self.config) for item in self._opened()]
        with writing(self.folder):
            write_whole(self._path(step), picture_bytes(_side_by_side(frames)))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.png"

    def _opened(self) -> list[EvalItem]:
        """The images, and what is written of them once."""
        if self._items is None:
            source = self._source.spread(IMAGES, labelled=True)
            self._items = list(evaluation_items(source, size=eval_size(self.config), native=True, masks=False))
            images = [_small(item.native[0].permute(1, 2, 0).numpy()) for item in self._items]
            left = np.cumsum([0, *(image.shape[1] for image in images)]).tolist()
            boxes = [[x, *image.shape[:2]] for x, image in zip(left, images, strict=False)]
            known = {"names": [item.name for item in self._items], "boxes": boxes}
            known["classes"] = list(source.class_names)
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
                write_whole(self.folder / "images.png", picture_bytes(_side_by_side(images)))
                write_whole(self.folder / "film.json", json.dumps(known, indent=1) + "\n")
        return self._items


class FilmFrames(NamedTuple):
    """The frames of a run, read back; of every image side by side, lists run over the images."""

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    steps: tuple[int, ...]
    images: list[UInt8[np.ndarray, "h w 3"]]
    cam: list[list[UInt8[np.ndarray, "h w"]]]
    """[frame][image], 0 to 255."""
    cam_class: list[list[UInt8[np.ndarray, "h w"]]]
    segmentation: list[list[UInt8[np.ndarray, "h w"]]]

    def picture(self, frame: int, *, show: str = "CAM", strength: float = 0.65) -> UInt8[np.ndarray, "H W 3"]:
        """The images of a frame side by side under their CAM or segmentation, twice as large as they are kept."""
        refuse_other(SHOWN, show=show)
        parts = []
        for image, cam, label in zip(self.images, self.cam[frame], self.segmentation[frame], strict=True):
            size = 2 * image.shape[1], 2 * image.shape[0]
            large = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
            if show == "CAM":
                value = cv2.resize(cam, size, interpolation=cv2.INTER_LINEAR) / np.float32(255)
                parts.append((255 * overlay(large, value, strength=strength)).round().astype(np.uint8))
            else:
                label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
                parts.append(label_over_image(large, label, None, strength=strength))
        return _side_by_side(parts)


def has_film(folder: Path | str) -> bool:
    """Whether a run's folder has a film."""
    return (Path(folder) / FOLDER / "film.json").is_file()


def read_film(folder: Path | str) -> FilmFrames:
    """Read the film of a run's folder. Raises ToCoError where there is none, or it is damaged."""
    folder = Path(folder) / FOLDER
    if not (folder / "film.json").is_file():
        raise ToCoError(
            f"{folder.parent} has no film: train(..., film=20) keeps one, `toco tiny --film 20` from a shell"
        )
    known = read_json(folder / "film.json")
    files = sorted(path for path in folder.glob("*.png") if path.stem.isdecimal())
    try:
        names, boxes, classes = tuple(known["names"]), known["boxes"], tuple(known["classes"])
        if not files or not 1 <= len(boxes) == len(names) <= IMAGES:
            raise ValueError(f"{len(files)} frames, {len(names)} names and {len(boxes)} places of images")
        images, *frames = (_cut(path, boxes) for path in (folder / "images.png", *files))
    except (KeyError, TypeError, ValueError) as error:
        raise ToCoError(f"{folder} is damaged, or no film ({error}): train the run anew with film=...") from error
    parts = [[[np.ascontiguousarray(image[..., c]) for image in frame] for frame in frames] for c in range(3)]
    return FilmFrames(names, classes, tuple(int(path.stem) for path in files), images, *parts)


def _frame(model: ToCo, item: EvalItem, config: TrainConfig) -> UInt8[np.ndarray, "h w 3"]:
    """CAM, its class and the decoder's class of one image, small."""
    predictor = ImagePredictor(model, config, passes=passes_of(model, config))
    with torch.no_grad():
        predictor.set_item(item)
        value, label = predictor.strongest()
        segmentation = predictor.segmentation()
    size = _size(value.shape)
    value = cv2.resize((255 * value).round().astype(np.uint8), size, interpolation=cv2.INTER_AREA)
    labels = [
        cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT) for m in (label, segmentation)
    ]
    return np.stack([value, *labels], axis=-1)


def _size(shape: Sequence[int]) -> tuple[int, int]:
    """(w, h) of the kept picture of an image h w."""
    scale = min(1.0, SIDE / max(shape[:2]))
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _small(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return cv2.resize(image, _size(image.shape), interpolation=cv2.INTER_AREA)


def _side_by_side(pictures: Sequence[np.ndarray]) -> UInt8[np.ndarray, "h w 3"]:
    height = max(len(picture) for picture in pictures)
    return np.hstack([np.pad(picture, ((0, height - len(picture)), (0, 0), (0, 0))) for picture in pictures])


def _cut(path: Path, boxes: Sequence[Sequence[int]]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The images of a picture of the film. Raises ValueError where it is larger than a film's or a place is not in
    it."""
    height, width = image_size(path)
    if height > SIDE or width > IMAGES * SIDE:
        raise ValueError(f"{path} is {height} x {width}: at most {SIDE} x {IMAGES * SIDE} are kept")
    strip, parts = read_image(path), []
    for left, h, w in boxes:
        part = np.ascontiguousarray(strip[:h, left : left + w])
        if left < 0 or not part.size or part.shape != (h, w, 3):
            raise ValueError(f"{path} has no part {[left, h, w]}")
        parts.append(part)
    return parts
