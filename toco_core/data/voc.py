"""A folder in the layout of PASCAL VOC: images, masks, lists of names, class names.

    root/JPEGImages/<name>.jpg                      (or .jpeg .png .bmp)
    root/SegmentationClass/<name>.png               palette or grey, 0 background, 1..K, 255 = ignore
    root/ImageSets/Segmentation/<split>.txt         one name a line
    root/classes.txt                                one class a line, background first (optional)
    root/Annotations/<name>.xml                     (optional, another source of image labels)

Image-level labels are derived from the masks (or the annotations), so that nothing but this folder is needed. Training
uses only these labels; masks otherwise serve to score.
"""

import copy
import hashlib
import pickle
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Int64, UInt8

from toco_core.data.files import IMAGE_SUFFIXES, MASK_SUFFIXES, index_files, map_files, read_image, read_mask
from toco_core.errors import ToCoError
from toco_core.labels import IGNORE

LAYOUT = "a VOC-layout folder holds JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt"
BACKGROUND_NAMES = ("background", "_background_", "__background__")
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class Report(NamedTuple):
    """What `check` found in one split, after every file of it was decoded."""

    root: Path
    split: str
    class_names: tuple[str, ...]  # C, background first
    class_source: str  # where the class names come from
    label_source: str  # where the image-level labels come from
    n_images: int
    n_masks: int
    images_per_class: Int64[np.ndarray, " K"]
    n_without_class: int  # images that show no foreground class
    void_share: float  # of all mask pixels; nan without masks
    smallest: tuple[int, int]  # H, W of the image with the fewest pixels
    largest: tuple[int, int]

    def __str__(self) -> str:
        (h, w), (H, W) = self.smallest, self.largest
        counts = ", ".join(
            f"{name} {n}" for name, n in zip(self.class_names[1:], self.images_per_class.tolist(), strict=True)
        )
        void = f", {self.void_share:.1%} of their pixels void" if self.n_masks else ""
        return (
            f"{self.root} [{self.split}]: {self.n_images} images of {h} x {w} to {H} x {W}, "
            f"{self.n_masks} masks{void}\n"
            f"{len(self.class_names) - 1} classes (from {self.class_source}; image labels from {self.label_source}): "
            f"{counts}; {self.n_without_class} images without any"
        )


class TrainVal(NamedTuple):
    """Two splits that share no name; `held_out` where the second was cut from the first one's list."""

    train: "VOCFolder"
    val: "VOCFolder"
    held_out: bool


class VOCFolder:
    """One split of a VOC-layout folder. Opening it looks at names only; `check` decodes every file.

    Attributes: `root`, `split`, `names` (in the order of the list), `class_names` (background first), `n_classes` (K,
    foreground only), `class_source` and `label_source` (where names and labels come from, in words). Item i has
    `image(i)` uint8 H W 3, `mask(i)` uint8 H W or None, and `image_labels[i]`, K numbers in {0, 1}.

    class_names: with or without a first "background". None: `classes.txt`; else VOC's 20, where the folder or its names
        look like VOC's; else "class 1" .. up to the largest value in any mask of the folder.
    labels: None: from the masks, or from `Annotations/*.xml` in a folder without masks. "masks" or "xml" asks for one
        of the two. A mapping name -> K numbers in {0, 1}, or -> class names. A path of an `.npy` file with such a
        mapping (the release's `cls_labels_onehot.npy`), read without running code from it, or with an N K array in the
        list's order.
    require_masks: an image without mask is an error. False: `mask(i)` is None there.

    The list may be in the two-column style of `train_aug`: the name is taken from the first column, the folder of masks
    from the second. Raises ToCoError, naming the folder, split or file.
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
        self._images = [_lookup(images, name, f"{split}.txt", self.root / "JPEGImages") for name in self.names]
        masks = _index(self.root / mask_folder, MASK_SUFFIXES)
        self._masks = [masks.get(_normal(name)) for name in self.names]
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

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"VOCFolder({str(self.root)!r}, {self.split!r}: {len(self)} images, {self.n_classes} classes)"

    @property
    def n_classes(self) -> int:
        """K: classes without background."""
        return len(self.class_names) - 1

    def image(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """RGB image of one item."""
        return read_image(self._images[index])

    def mask(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Class values of one item, 255 = ignore; None where there is no mask and none is required."""
        path = self._masks[index]
        return None if path is None else read_mask(path)

    @property
    def image_labels(self) -> UInt8[np.ndarray, "N K"]:
        """Image-level labels in {0, 1}; derived on first use (that reads every mask or annotation once) and kept."""
        if self._image_labels is None:
            label_of = self._label_from_xml if self.label_source == "xml" else self._label_from_mask
            self._image_labels = np.stack(map_files(label_of, range(len(self)), what=f"labels of {self.split}"))
        return self._image_labels

    def subset(self, indices: Iterable[int]) -> "VOCFolder":
        """The same folder with only these items, in this order."""
        indices = [int(i) for i in indices]
        if not indices:
            raise ToCoError(f"a subset of {self.root} [{self.split}] has no items: at least one is needed")
        part = copy.copy(self)
        part.names = tuple(self.names[i] for i in indices)
        part._images = [self._images[i] for i in indices]
        part._masks = [self._masks[i] for i in indices]
        part._image_labels = None if self._image_labels is None else self._image_labels[indices]
        return part

    def check(self, *, progress: bool = True) -> Report:
        """Decode every image and mask on several threads; report, or raise ToCoError naming the first bad file.

        Found here and not on opening: truncated or damaged files, masks whose size differs from the image's, mask
        values outside the classes, labels that do not fit. The derived labels are kept, so that checking costs nothing
        twice.
        """
        found = map_files(self._check_one, range(len(self)), what=f"checking {self.split}", progress=progress)
        if self._image_labels is None and self.label_source == "masks" and None not in self._masks:
            self._image_labels = np.stack([row for _, row, _ in found])
        labels = self.image_labels
        sizes = sorted((size for size, _, _ in found), key=lambda size: size[0] * size[1])
        pixels = sum(h * w for (h, w), row, _ in found if row is not None)
        return Report(
            root=self.root,
            split=self.split,
            class_names=self.class_names,
            class_source=self.class_source,
            label_source=self.label_source,
            n_images=len(self),
            n_masks=sum(path is not None for path in self._masks),
            images_per_class=labels.sum(axis=0, dtype=np.int64),
            n_without_class=int((labels.sum(axis=1) == 0).sum()),
            void_share=sum(void for _, _, void in found) / pixels if pixels else float("nan"),
            smallest=sizes[0],
            largest=sizes[-1],
        )

    def _check_one(self, index: int) -> tuple[tuple[int, int], np.ndarray | None, int]:
        """(H, W), label row, number of void pixels."""
        height, width = self.image(index).shape[:2]
        mask = self.mask(index)
        if mask is None:
            return (height, width), None, 0
        if mask.shape != (height, width):
            raise ToCoError(
                f"{self._masks[index]} is {mask.shape[0]} x {mask.shape[1]} but its image "
                f"{self._images[index].name} is {height} x {width}: a mask has the size of its image"
            )
        counts = self._count_values(mask, index)
        return (height, width), (counts[1 : self.n_classes + 1] > 0).astype(np.uint8), int(counts[IGNORE])

    def _count_values(self, mask: np.ndarray, index: int) -> np.ndarray:
        counts = np.bincount(mask.ravel(), minlength=256)
        wrong = [v for v in np.flatnonzero(counts).tolist() if self.n_classes < v != IGNORE]
        if wrong:
            raise ToCoError(
                f"{self._masks[index]} holds the value{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong))}: "
                f"allowed are 0..{self.n_classes} ({self.n_classes} classes from {self.class_source}) "
                f"and {IGNORE} = ignore"
            )
        return counts

    def _label_from_mask(self, index: int) -> UInt8[np.ndarray, " K"]:
        mask = self.mask(index)
        if mask is None:
            raise ToCoError(
                f"{self._images[index]} has no mask to derive its image labels from: "
                "add masks or Annotations/, or pass labels"
            )
        return (self._count_values(mask, index)[1 : self.n_classes + 1] > 0).astype(np.uint8)

    def _label_from_xml(self, index: int) -> UInt8[np.ndarray, " K"]:
        path = self.root / "Annotations" / f"{self.names[index]}.xml"
        try:
            objects = {(node.findtext("name") or "").strip() for node in ElementTree.parse(path).iter("object")}
        except OSError as error:
            raise ToCoError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ElementTree.ParseError, ValueError) as error:
            raise ToCoError(f"{path} is not valid XML: {error}") from error
        return _one_hot(objects, self.class_names, path)


def check(
    root: Path | str,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    labels: Mapping[str, Any] | Path | str | None = None,
    require_masks: bool = True,
    progress: bool = True,
) -> Report:
    """Open a split and decode all of it: `VOCFolder(...).check()`. Raises ToCoError, naming the first bad thing."""
    folder = VOCFolder(root, split, class_names=class_names, labels=labels, require_masks=require_masks)
    return folder.check(progress=progress)


def split_names(root: Path | str) -> tuple[str, ...]:
    """The splits that `root` has lists for, sorted."""
    _require_layout(Path(root), masks=False)
    return tuple(sorted(path.stem for path in _list_folder(Path(root)).glob("*.txt")))


def holdout(names: Sequence[str], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Cut a list of names in two: the indices that stay, and about `fraction` of them that are held out.

    A name is held out where a hash of (seed, name), as a number in [0, 1), is below `fraction`. So the cut depends
    neither on the order of the list nor on the machine, and a name keeps its side when others are added. Where one side
    would be empty, the name nearest to the cut is moved there. Raises ToCoError for a fraction outside (0, 1) or fewer
    than 2 names.
    """
    if not 0 < fraction < 1:
        raise ToCoError(f"fraction = {fraction} to hold out must be between 0 and 1")
    if len(names) < 2:
        raise ToCoError(f"{len(names)} names cannot be cut in two: at least 2 are needed")
    place = [int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") / 2.0**64 for name in names]
    order = sorted(range(len(names)), key=place.__getitem__)
    n_out = min(max(sum(p < fraction for p in place), 1), len(names) - 1)
    return sorted(order[n_out:]), sorted(order[:n_out])


def open_train_val(
    root: Path | str, *, train: str = "train", val: str = "val", fraction: float = 0.2, seed: int = 0, **options
) -> TrainVal:
    """Both parts that training needs; where the folder has no list `val`, that part is cut from `train` by `holdout`.

    `options` go to `VOCFolder`. Raises ToCoError as it does.
    """
    whole = VOCFolder(root, train, **options)
    if val in split_names(root):
        return TrainVal(whole, VOCFolder(root, val, **options), False)
    kept, out = holdout(whole.names, fraction, seed)
    return TrainVal(whole.subset(kept), whole.subset(out), True)


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


def _normal(name: str) -> str:
    """One spelling for names that look alike: file systems differ in how they compose accents."""
    return unicodedata.normalize("NFC", name)


def _index(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    return {_normal(name): path for name, path in index_files(folder, suffixes).items()}


def _lookup(files: dict[str, Path], name: str, list_name: str, folder: Path) -> Path:
    try:
        return files[_normal(name)]
    except KeyError:
        raise ToCoError(f"{folder / name} ({'/'.join(IMAGE_SUFFIXES)}), named in {list_name}, does not exist") from None


def _read_list(root: Path, split: str, images: Mapping[str, Path]) -> tuple[tuple[str, ...], str]:
    """Names of a split, and the name of the folder with its masks."""
    path = _list_folder(root) / f"{split}.txt"
    if not split or PurePosixPath(split).name != split or not path.is_file():
        known = ", ".join(split_names(root)) or "no lists"
        raise ToCoError(f"split {split!r} is not in {root}: ImageSets/Segmentation has {known}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ToCoError(f"{path} cannot be read as a list of names: {error}") from error
    mask_folders = set()
    names = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        columns = line.split()
        if _normal(line) in images or len(columns) == 1:
            names.append(_plain_name(line, path, number))
            continue
        names.append(_plain_name(columns[0], path, number))  # more columns: masks (train_aug) or flags (Main/*.txt)
        folder = PurePosixPath(columns[1].lstrip("/")).parts[0]
        if folder.startswith("SegmentationClass"):
            mask_folders.add(folder)
    if not names:
        raise ToCoError(f"split {split!r} is empty: {path} names no image")
    if len(mask_folders) > 1:
        raise ToCoError(f"{path} names masks in {' and '.join(sorted(mask_folders))}: one folder is allowed")
    twice = next((name for name, n in _counts(names).items() if n > 1), None)
    if twice is not None:
        raise ToCoError(f"{path} names {twice!r} more than once")
    if mask_folders:
        return tuple(names), mask_folders.pop()
    augmented = split.endswith("aug") and (root / "SegmentationClassAug").is_dir()
    return tuple(names), "SegmentationClassAug" if augmented else "SegmentationClass"


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _plain_name(entry: str, path: Path, number: int) -> str:
    """A list entry as a name below JPEGImages; refuses everything that could lead out of the folder."""
    name = entry
    if name.startswith("/JPEGImages/"):  # the style of train_aug.txt, relative to the folder although it looks absolute
        name = name.removeprefix("/JPEGImages/")
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
        raise ToCoError(
            f"{path} line {number}: {entry!r} is not a name inside JPEGImages; absolute paths and '..' are refused"
        )
    if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
        name = PurePosixPath(name).with_suffix("").as_posix()
    return name


def _find_classes(
    root: Path, names: Sequence[str], masks: Mapping[str, Path], given: Sequence[str] | None
) -> tuple[tuple[str, ...], str]:
    """Class names with background first, and where they come from."""
    path = root / "classes.txt"
    if given is not None:
        return _with_background(given, "class_names"), "class_names"
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ToCoError(f"{path} cannot be read as a list of classes: {error}") from error
        return _with_background(lines, str(path)), "classes.txt"
    voc_years = "20(0[7-9]|1[0-2])"
    named_like_voc = all(re.fullmatch(rf"{voc_years}_\d{{6}}", name) for name in names)
    if named_like_voc or re.fullmatch(f"VOC{voc_years}", root.resolve().name):
        return VOC_CLASSES, "PASCAL VOC"
    if not masks:
        raise ToCoError(f"{root} has neither classes.txt nor masks to take the classes from")
    top = max(map_files(_largest_value, masks.values(), what="classes from the masks"))
    if top == 0:
        raise ToCoError(f"the masks of {root} hold only background: no class to learn; add classes.txt or better masks")
    return _with_background([f"class {k}" for k in range(1, top + 1)], "masks"), "the values in the masks"


def _largest_value(path: Path) -> int:
    mask = read_mask(path)
    return int(mask.max(initial=0, where=mask != IGNORE))


def _with_background(names: Sequence[str], source: str) -> tuple[str, ...]:
    names = [name.strip() for name in names if name.strip()]
    if not names or names[0].lower() not in BACKGROUND_NAMES:
        names = ["background", *names]
    names[0] = "background"
    if not 2 <= len(names) <= IGNORE:
        raise ToCoError(f"{source} names {len(names) - 1} classes besides background: 1..{IGNORE - 1} are allowed")
    twice = [name for name, n in _counts(names).items() if n > 1]
    if twice:
        raise ToCoError(f"{source} names the class {twice[0]!r} more than once")
    return tuple(names)


def _one_hot(present: Iterable[str], class_names: Sequence[str], source: Path | str) -> UInt8[np.ndarray, " K"]:
    present = set(present)
    unknown = sorted(present - set(class_names[1:]))
    if unknown:
        raise ToCoError(f"{source} names the class {unknown[0]!r}: known are {', '.join(class_names[1:])}")
    return np.array([name in present for name in class_names[1:]], dtype=np.uint8)


def _given_labels(
    labels: Mapping[str, Any] | Path | str, names: Sequence[str], class_names: Sequence[str]
) -> list[UInt8[np.ndarray, " K"]]:
    """Label rows in the order of `names` from a mapping or from an .npy file."""
    source = "labels" if isinstance(labels, Mapping) else str(labels)
    if not isinstance(labels, Mapping):
        labels = _read_npy_labels(Path(labels))
    if isinstance(labels, np.ndarray):
        if len(labels) != len(names):
            raise ToCoError(f"{source} has {len(labels)} rows for {len(names)} images")
        labels = dict(zip(names, labels, strict=True))
    rows = []
    for name in names:
        if name not in labels:
            raise ToCoError(f"{source} has no image labels for {name!r}")
        entry = labels[name]
        if all(isinstance(value, str) for value in entry) and not isinstance(entry, str):
            rows.append(_one_hot(entry, class_names, f"{source} for {name!r}"))
            continue
        row = np.asarray(entry)
        if row.shape != (len(class_names) - 1,) or not np.isin(row, (0, 1)).all():
            raise ToCoError(
                f"{source} for {name!r} is {row.tolist()!r:.80}: "
                f"a row of {len(class_names) - 1} numbers 0 or 1, or class names"
            )
        rows.append(row.astype(np.uint8))
    return rows


def _read_npy_labels(path: Path) -> Mapping[str, Any] | np.ndarray:
    """An N K array, or the pickled mapping name -> row that this field passes around, read without running its code."""
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) == (1, 0):
                _, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                _, _, dtype = np.lib.format.read_array_header_2_0(file)
            content = _ArrayUnpickler(file).load() if dtype.hasobject else np.load(path, allow_pickle=False)
        if dtype.hasobject and isinstance(content, np.ndarray) and content.ndim == 0:
            content = content.item()  # the field's way of saving a mapping
    except ToCoError:
        raise
    except OSError as error:
        raise ToCoError(f"labels {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises almost any type
        raise ToCoError(f"labels {path} is not a NumPy file of image labels: {error}") from error
    if not isinstance(content, Mapping) and not (isinstance(content, np.ndarray) and content.ndim == 2):
        raise ToCoError(f"labels {path} holds a {type(content).__name__}: a mapping name -> labels or N K is needed")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds mappings, strings, numbers and arrays, and refuses every other name: a label file runs no code."""

    ALLOWED = {
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in ((f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar"))
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise ToCoError(f"refused: it would load {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
