"""A folder in the layout of PASCAL VOC: images, masks, lists of names, class names.

    root/JPEGImages/<name>.jpg                      (or .jpeg .png .bmp)
    root/SegmentationClass/<name>.png               palette or grey, 0 background, 1..K, 255 = ignore
    root/ImageSets/Segmentation/<split>.txt         one name a line
    root/classes.txt                                one class a line, background first (optional)
    root/Annotations/<name>.xml                     (optional, another source of image labels)

Image-level labels are derived from the masks (or the annotations), so that nothing but this folder is needed. Training
uses only these labels; masks otherwise serve to score.

The split train_aug of the field (10,582 images: VOC's train and what SBD adds to it, without VOC's val) has its masks
in SegmentationClassAug/, or, where that folder is not there, from SBD's own files (see `sbd`); VOC's mask comes first
where an image has both.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import UInt8

from toco_core.conventions import IGNORE
from toco_core.data.files import IMAGE_SUFFIXES, MASK_SUFFIXES, index_files, map_files, read_mask
from toco_core.data.layouts.npy import read_npy_labels
from toco_core.data.layouts.sbd import read_sbd_mask, sbd_folder
from toco_core.data.split import (
    Report,
    Split,
    inside_name,
    listed_files,
    one_hot,
    one_spelling,
    read_lines,
    refuse_twice,
    with_background,
    without_suffix,
)
from toco_core.errors import ToCoError
from toco_core.machine.intake import read_bytes

LAYOUT = "a VOC-layout folder holds JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt"
AUGMENTED = "SegmentationClassAug"  # masks of SBD and VOC together, as the field passes them around
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOCFolder(Split):
    """One split of a VOC-layout folder. Opening it looks at names only; `check` decodes every file.

    class_names: with or without a first "background". None: `classes.txt`; else VOC's 20, where the folder or its names
        look like VOC's; else "class 1" .. up to the largest value in any mask of the folder.
    labels: None: from the masks, or from `Annotations/*.xml` in a folder without masks. "masks" or "xml" asks for one
        of the two. A mapping name -> K numbers in {0, 1}, or -> class names. A path of an `.npy` file with such a
        mapping (the release's `cls_labels_onehot.npy`), read without running code from it, or with an N K array in the
        list's order.
    require_masks: an image without mask is an error. False: `mask(i)` is None there.

    The list may be in the two-column style of `train_aug`: the name is taken from the first column, the folder of masks
    from the second. Without a list, `train_aug` is every mask in SegmentationClassAug/, or of SBD and VOC, that is not
    in val. Raises ToCoError, naming the folder, split or file.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        *,
        class_names: Sequence[str] | None = None,
        labels: Mapping[str, Any] | Path | str | None = None,
        require_masks: bool = True,
    ):
        self.root, self.split = Path(root), split
        _require_layout(self.root, masks=require_masks)
        images = _index(self.root / "JPEGImages", IMAGE_SUFFIXES)
        self.names, mask_folder = _read_list(self.root, split, images)
        folder, kinds = self.root / "JPEGImages", f" ({'/'.join(IMAGE_SUFFIXES)})"
        self._images = listed_files(images, self.names, folder, f"{split}.txt", kinds=kinds)
        masks = _index_masks(self.root, mask_folder)
        self._masks = [masks.get(one_spelling(name)) for name in self.names]
        bare = [path for path, mask in zip(self._images, self._masks, strict=True) if mask is None]
        if bare and require_masks:
            more = f" ({len(bare) - 1} more images have none)" if len(bare) > 1 else ""
            raise ToCoError(f"{bare[0]} has no mask {bare[0].stem}.png in {self.root / mask_folder}{more}")
        self.class_names, self.class_source = _find_classes(self.root, self.names, masks, class_names)
        if labels is None:
            labels = "xml" if bare and (self.root / "Annotations").is_dir() else "masks"
        self._image_labels: UInt8[np.ndarray, "N K"] | None = None
        if isinstance(labels, str) and labels in ("masks", "xml"):
            self.label_source = labels
        else:
            self.label_source = "a mapping" if isinstance(labels, Mapping) else str(labels)
            self._image_labels = np.stack(_given_labels(labels, self.names, self.class_names))

    def mask(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Class values of one item, 255 = ignore; None where there is no mask and none is required."""
        path = self._masks[index]
        return None if path is None else _read_mask(path)

    def _mask_name(self, index: int) -> str:
        return str(self._masks[index])

    def _label_row(self, index: int) -> UInt8[np.ndarray, " K"]:
        return self._label_from_xml(index) if self.label_source == "xml" else self._label_from_mask(index)

    def _label_from_xml(self, index: int) -> UInt8[np.ndarray, " K"]:
        path = self.root / "Annotations" / f"{self.names[index]}.xml"
        try:
            tree = ElementTree.fromstring(read_bytes(path, "text_bytes"))
            objects = {(node.findtext("name") or "").strip() for node in tree.iter("object")}
        except ToCoError:
            raise
        except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
            raise ToCoError(f"{path} is not valid XML: {error}") from error
        return one_hot(objects, self.class_names, path)


def check(root: Path | str, split: str, *, progress: bool = True, **options: Any) -> Report:
    """Open a split and decode all of it: `VOCFolder(root, split, **options).check()`. Raises ToCoError, naming the
    first bad thing."""
    return VOCFolder(root, split, **options).check(progress=progress)


def split_names(root: Path | str) -> tuple[str, ...]:
    """The splits that `root` has lists for, sorted."""
    _require_layout(Path(root), masks=False)
    listed = {path.stem for path in _list_folder(Path(root)).glob("*.txt")}
    return tuple(sorted(listed | ({"train_aug"} if _is_derived(Path(root), "train_aug") else set())))


def _list_folder(root: Path) -> Path:
    return root / "ImageSets" / "Segmentation"


def _require_layout(root: Path, *, masks: bool) -> None:
    if not root.is_dir():
        raise ToCoError(f"dataset folder {root} {'is a file' if root.exists() else 'does not exist'}; {LAYOUT}")
    wanted = [root / "JPEGImages", _list_folder(root)]
    missing = [folder for folder in wanted if not folder.is_dir()]
    if masks and not any(folder.is_dir() for folder in root.glob("SegmentationClass*")):
        missing.append(root / "SegmentationClass")
    if missing:
        inside = [child.name for child in sorted(root.iterdir()) if (child / "JPEGImages").is_dir()]
        hint = f"; did you mean {root / inside[0]}?" if inside else ""
        gone = ", ".join(folder.relative_to(root).as_posix() + "/" for folder in missing)
        raise ToCoError(f"dataset folder {root} has no {gone}; {LAYOUT}{hint}")


def _index(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    return {one_spelling(name): path for name, path in index_files(folder, suffixes).items()}


def _index_masks(root: Path, folder: str) -> dict[str, Path]:
    """The masks of a folder by name. In the place of a SegmentationClassAug/ that is not there: SBD's and VOC's."""
    sbd = sbd_folder(root) if folder == AUGMENTED and not (root / AUGMENTED).is_dir() else None
    if sbd is None:
        return _index(root / folder, MASK_SUFFIXES)
    return _index(sbd, (".mat",)) | _index(root / "SegmentationClass", MASK_SUFFIXES)


def _read_mask(path: Path) -> UInt8[np.ndarray, "H W"]:
    return read_sbd_mask(path) if path.suffix.lower() == ".mat" else read_mask(path)


def _is_augmented(root: Path) -> bool:
    return (root / AUGMENTED).is_dir() or sbd_folder(root) is not None


def _read_list(root: Path, split: str, images: Mapping[str, Path]) -> tuple[tuple[str, ...], str]:
    """Names of a split, and the name of the folder with its masks."""
    path = _list_folder(root) / f"{split}.txt"
    if _is_derived(root, split):
        return _augmented_names(root), AUGMENTED
    if not split or PurePosixPath(split).name != split or not path.is_file():
        known = ", ".join(split_names(root)) or "no lists"
        raise ToCoError(f"split {split!r} is not in {root}: ImageSets/Segmentation has {known}")
    lines = read_lines(path, "a list of names")
    mask_folders = set()
    names = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        columns = line.split()
        if one_spelling(line) in images or len(columns) == 1:
            names.append(_plain_name(line, images, path, number))
            continue
        # more columns: masks (train_aug) or flags (Main/*.txt)
        names.append(_plain_name(columns[0], images, path, number))
        folder = columns[1].lstrip("/").partition("/")[0]
        if folder.startswith("SegmentationClass"):
            inside_name(folder, f"{path} line {number}", "the data set")
            mask_folders.add(folder)
    if not names:
        raise ToCoError(f"split {split!r} is empty: {path} names no image")
    if len(mask_folders) > 1:
        raise ToCoError(f"{path} names masks in {' and '.join(sorted(mask_folders))}: one folder is allowed")
    refuse_twice(names, f"{path} names")
    if mask_folders:
        return tuple(names), mask_folders.pop()
    augmented = split.endswith("aug") and _is_augmented(root)
    return tuple(names), AUGMENTED if augmented else "SegmentationClass"


def _is_derived(root: Path, split: str) -> bool:
    """Whether this is `train_aug` without a list, in a folder from whose masks it follows."""
    lists = _list_folder(root)
    return (
        split == "train_aug"
        and not (lists / "train_aug.txt").is_file()
        and (lists / "val.txt").is_file()
        and _is_augmented(root)
    )


def _augmented_names(root: Path) -> tuple[str, ...]:
    """`train_aug` as it is defined: every image that SBD or VOC gives a mask, without VOC's val."""
    images = _index(root / "JPEGImages", IMAGE_SUFFIXES)
    val = {one_spelling(name) for name in _read_list(root, "val", images)[0]}
    names = sorted(name for name in _index_masks(root, AUGMENTED) if name not in val and name in images)
    if not names:
        raise ToCoError(f"neither {root / AUGMENTED} nor SBD has a mask of an image outside val: train_aug is empty")
    return tuple(names)


def _plain_name(entry: str, images: Mapping[str, Path], path: Path, number: int) -> str:
    """Take a list entry as a name below JPEGImages; refuse everything that could lead out of the folder.

    The suffix of an image file is left out, unless it belongs to the name of one of `images`.
    """
    name = entry
    if name.startswith("/JPEGImages/"):  # the style of train_aug.txt, relative to the folder although it looks absolute
        name = name.removeprefix("/JPEGImages/")
    name = inside_name(name, f"{path} line {number}", "JPEGImages")
    return name if one_spelling(name) in images else without_suffix(name)


def _find_classes(
    root: Path, names: Sequence[str], masks: Mapping[str, Path], given: Sequence[str] | None
) -> tuple[tuple[str, ...], str]:
    """Class names with background first, and where they come from."""
    path = root / "classes.txt"
    if given is not None:
        return with_background(given, "class_names"), "class_names"
    if path.is_file():
        return with_background(read_lines(path, "a list of classes"), str(path)), "classes.txt"
    voc_years = "20(0[7-9]|1[0-2])"
    named_like_voc = all(re.fullmatch(rf"{voc_years}_\d{{6}}", name) for name in names)
    if named_like_voc or re.fullmatch(f"VOC{voc_years}", root.resolve().name):
        return VOC_CLASSES, "PASCAL VOC"
    if not masks:
        raise ToCoError(f"{root} has neither classes.txt nor masks to take the classes from")
    top = max(map_files(_largest_value, masks.values(), what="classes from the masks"))
    if top == 0:
        raise ToCoError(f"the masks of {root} hold only background: no class to learn; add classes.txt or better masks")
    return with_background([f"class {k}" for k in range(1, top + 1)], "masks"), "the values in the masks"


def _largest_value(path: Path) -> int:
    mask = _read_mask(path)
    return int(mask.max(initial=0, where=mask != IGNORE))


def _given_labels(
    labels: Mapping[str, Any] | Path | str, names: Sequence[str], class_names: Sequence[str]
) -> list[UInt8[np.ndarray, " K"]]:
    """Label rows in the order of `names` from a mapping or from an .npy file."""
    source = "labels" if isinstance(labels, Mapping) else str(labels)
    if not isinstance(labels, Mapping):
        labels = read_npy_labels(Path(labels))
    if isinstance(labels, np.ndarray):
        if len(labels) != len(names):
            raise ToCoError(f"{source} has {len(labels)} rows for {len(names)} images")
        labels = dict(zip(names, labels, strict=True))
    rows = []
    for name in names:
        if name not in labels:
            raise ToCoError(f"{source} has no image labels for {name!r}")
        entry = labels[name]
        several = isinstance(entry, (list, tuple, set, frozenset)) or (isinstance(entry, np.ndarray) and entry.ndim)
        if several and all(isinstance(value, str) for value in entry):
            rows.append(one_hot(entry, class_names, f"{source} for {name!r}"))
            continue
        try:
            row = np.asarray(entry)
        except ValueError:  # lists of different lengths
            row = np.array(None)
        if row.shape != (len(class_names) - 1,) or row.dtype.kind not in "biuf" or not np.isin(row, (0, 1)).all():
            told = np.array2string(row, threshold=8) if row.dtype.kind in "biufU" else f"{row.dtype} of {row.shape}"
            raise ToCoError(
                f"{source} for {name!r} is {told:.80}: a row of {len(class_names) - 1} numbers 0 or 1, or class names"
            )
        rows.append(row.astype(np.uint8))
    return rows
