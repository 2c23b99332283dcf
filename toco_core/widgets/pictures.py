"""The images to look at: a split of a data set in any layout, or any folder of photographs.

Nothing here gives up because of one file: what is wrong with an image is told when it is asked for, and the others stay
at hand.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from toco_core.data import Split, open_source, read_image, recognise
from toco_core.data.files import IMAGE_SUFFIXES, decode_image, index_files
from toco_core.data.split import index_of
from toco_core.errors import ToCoError
from toco_core.machine.intake import refuse_above

LONGEST_SIDE = 1024  # pixels; larger photographs are reduced, so that every answer stays quick
THUMBNAIL_SIDE = 72
MOST_OWN = 32  # photographs that a reader can bring: each takes up to 3 MB


class Picture(NamedTuple):
    """One image. Class numbers are those of the data set, 1..K."""

    name: str
    image: np.ndarray  # uint8 H W 3
    mask: np.ndarray | None  # uint8 H W, 255 = ignore
    labels: tuple[int, ...] | None  # classes that it is known to show; None: not known
    notes: tuple[str, ...]  # what a reader should know about it


class Pictures:
    """Images by number. `names`, `class_names` (background first; empty where the folder knows no classes), `title`."""

    def __init__(self, names: Sequence[str], files: Sequence[Path], *, title: str, source: Split | None = None):
        if not names:
            raise ToCoError(f"{title} holds no image: {' '.join(IMAGE_SUFFIXES)} are read")
        self.names, self.title = tuple(names), title
        self.class_names: tuple[str, ...] = () if source is None else source.class_names
        self._files, self._source = list(files), source
        self.own: list[tuple[str, np.ndarray]] = []  # name and image of photographs that the reader brought
        self._labels: dict[int, tuple[int, ...] | None] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_listed(self) -> int:
        """Images of the data set; those that the reader brought come behind them."""
        return len(self._files)

    def beside(self, others: "Pictures") -> bool:
        """Whether the files of both lie in one folder."""
        return self._files[0].resolve().parent == others._files[0].resolve().parent

    def bring(self, name: str, data: bytes) -> int:
        """Add a photograph, the bytes of a file, and return its number.

        Raises ToCoError for what `data.read_image` refuses, and where `MOST_OWN` were brought.
        """
        if len(self.own) >= MOST_OWN:
            raise ToCoError(f"{MOST_OWN} photographs of yours are here: no more fit, begin anew")
        name = Path(name.replace("\\", "/")).name[:100] or "photograph"
        refuse_above("image_bytes", len(data), name, "bytes")
        image, stem, number = decode_image(name, data), Path(name).stem or name, 1
        while (name := f"{stem} ({number})" if number > 1 else stem) in self.names:
            number += 1
        self.own.append((name, _reduced(image)))
        self.names = (*self.names, name)
        return len(self.names) - 1

    def adopt(self, others: "Pictures") -> None:
        """Take over the photographs that the reader brought to other images."""
        self.own = list(others.own)
        self.names = (*self.names[: self.n_listed], *(name for name, _ in self.own))

    def picture(self, index: int) -> Picture:
        """Image, mask and labels. Raises ToCoError where the image cannot be read; a bad mask is only noted."""
        name = self.names[index]
        if index >= self.n_listed:
            return Picture(name, self.own[index - self.n_listed][1], None, None, ())
        image, mask, notes = read_image(self._files[index]), None, []
        if self._source is not None:
            try:
                mask = self._checked_mask(index, image.shape[:2])
            except ToCoError as error:
                notes.append(f"no ground truth: {_file_only(error)}")
        labels = self.labels(index)
        if mask is None and not notes and self._source is not None:
            notes.append(f"{name} has no mask: no numbers against ground truth")
        scale = LONGEST_SIDE / max(image.shape[:2])
        if scale < 1:
            before, image = image.shape, _reduced(image)
            size = image.shape[1::-1]
            notes.append(f"{before[0]} x {before[1]} is shown and scored at {size[1]} x {size[0]}")
            mask = None if mask is None else cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        return Picture(name, image, mask, labels, tuple(notes))

    def labels(self, index: int) -> tuple[int, ...] | None:
        """Class numbers of the image-level label, or None where nothing tells them; read once."""
        if index not in self._labels:
            try:
                unknown = self._source is None or index >= self.n_listed
                row = None if unknown else self._source.subset([index]).image_labels[0]
            except ToCoError:
                row = None
            self._labels[index] = None if row is None else tuple(int(k) + 1 for k in np.flatnonzero(row))
        return self._labels[index]

    def thumbnail(self, index: int) -> np.ndarray | None:
        """uint8 RGB, `THUMBNAIL_SIDE` square, cut from the middle; None where the file cannot be read."""
        try:
            own = index >= self.n_listed
            image = self.own[index - self.n_listed][1] if own else read_image(self._files[index])
        except ToCoError:
            return None
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = np.ascontiguousarray(image[top : top + side, left : left + side])
        return cv2.resize(square, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)

    def find(self, text: str) -> list[int]:
        """Numbers of the images whose name or one of whose classes holds each word of `text`; "" finds all."""
        words = text.lower().split()
        found = []
        for index, name in enumerate(self.names):
            if all(word in name.lower() for word in words):
                found.append(index)
            elif self.class_names:
                known = " ".join(self.class_names[k].lower() for k in self.labels(index) or ())
                if all(word in name.lower() or word in known for word in words):
                    found.append(index)
        return found

    def index_of(self, name: str) -> int:
        """The number of a name, or of a number written as text. Raises ToCoError where there is none."""
        return index_of(name, self.names, self.title)

    def _checked_mask(self, index: int, size: tuple[int, int]) -> np.ndarray | None:
        mask = self._source.mask(index)
        if mask is not None and mask.shape != tuple(size):
            raise ToCoError(f"its mask is {mask.shape[0]} x {mask.shape[1]}, the image {size[0]} x {size[1]}")
        return mask


def open_pictures(dataset: str | Path, split: str = "val") -> Pictures:
    """The embedded data set (`scenes`), a split of a data set in any layout of `data.open_source`, or all images in any
    other folder.

    A data set without a split of this name shows the first that it has. Raises ToCoError for a folder that is not there
    or without images.
    """
    root = Path(dataset)
    if dataset != "scenes" and not root.exists():
        raise ToCoError(f"dataset = {str(dataset)!r} is not a folder: give `scenes` or a folder of images")
    try:
        layout = recognise(dataset)
    except ToCoError:
        if root.is_file():
            raise
        files = index_files(root, IMAGE_SUFFIXES, hidden=False)
        names = sorted(files)
        return Pictures(names, [files[name] for name in names], title=root.name)
    split = split if split in layout.splits or not layout.splits else layout.splits[0]
    options = {"require_masks": False} if layout.kind == "VOC" else {}
    source = open_source(dataset, split, **options)
    files = [source.image_path(index) for index in range(len(source))]
    return Pictures(source.names, files, title=f"{layout.root.name} [{split}]", source=source)


def _reduced(image: np.ndarray) -> np.ndarray:
    """The image, at most `LONGEST_SIDE` long."""
    scale = LONGEST_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _file_only(error: ToCoError) -> str:
    """The message without the folders of this machine."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in str(error).split(" "))
