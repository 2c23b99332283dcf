"""One split of a data set, whatever its layout: names, images, masks where there are some, image-level labels.

The readers (`voc`, `coco`, `tags`) fill a `Split`; loaders, training, evaluation and export ask nothing else. Opening
looks at names only; `check` decodes every file.
"""

import copy
import hashlib
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from toco_core.conventions import IGNORE, IGNORED
from toco_core.data.files import IMAGE_SUFFIXES, attempt_files, map_files, raise_first, read_image
from toco_core.errors import ToCoError
from toco_core.machine.intake import read_text, real_path

BACKGROUND_NAMES = ("background", "_background_", "__background__")
BROKEN = ("stop", "leave out")
HELD_OUT = "val (held out of {})"  # what reports call a part that was cut from a list


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
    left_out: tuple[str, ...] = ()  # what is wrong with each file that was left out

    def __str__(self) -> str:
        (h, w), (H, W) = self.smallest, self.largest
        counts = ", ".join(
            f"{name} {n}" for name, n in zip(self.class_names[1:], self.images_per_class.tolist(), strict=True)
        )
        void = f", {self.void_share:.1%} of their pixels void" if self.n_masks else ""
        left = f"\n{len(self.left_out)} left out: {'; '.join(self.left_out)}" if self.left_out else ""
        return (
            f"{self.root} [{self.split}]: {self.n_images} images of {h} x {w} to {H} x {W}, "
            f"{self.n_masks} masks{void}\n"
            f"{len(self.class_names) - 1} classes (from {self.class_source}; image labels from {self.label_source}): "
            f"{counts}; {self.n_without_class} images without any{left}"
        )


class Split:
    """Images of one split, in the order of `names`.

    Attributes: `root`, `split`, `names`, `class_names` (background first), `n_classes` (K, foreground only),
    `class_source` and `label_source` (where names and labels come from, in words), `left_out` (the names of the items
    that `readable` dropped, and what is wrong with each). Item i has `image(i)` uint8 H W 3, `mask(i)` uint8 H W or
    None, both of one size from `pair(i)`, and `image_labels[i]`, K numbers in {0, 1}.

    A reader sets these, `_images` (a file per item) and `_masks` (what `mask` draws from, or None), and defines `mask`,
    `_mask_name` and, where labels are not known on opening, `_label_row`.
    """

    root: Path
    split: str
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    class_source: str
    label_source: str
    left_out: Mapping[str, str] = MappingProxyType({})
    _images: list[Path]
    _masks: list
    _image_labels: UInt8[np.ndarray, "N K"] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return (
            f"{type(self).__name__}({str(self.root)!r}, {self.split!r}: "
            f"{len(self)} images, {self.n_classes} classes{left})"
        )

    @property
    def n_classes(self) -> int:
        """K: classes without background."""
        return len(self.class_names) - 1

    @property
    def n_masks(self) -> int:
        """How many images have a mask."""
        return sum(mask is not None for mask in self._masks)

    def image(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """RGB image of one item."""
        return read_image(self._images[index])

    def image_path(self, index: int) -> Path:
        """The file of one image."""
        return self._images[index]

    def outside(self) -> list[int]:
        """Images that are links to files outside of the data set: a link farm has them, and so has a folder whose
        author wants a file of yours."""
        root = real_path(self.root)
        root = root if root.is_dir() else root.parent
        return [i for i, path in enumerate(self._images) if root not in real_path(path).parents]

    def mask_source(self, index: int) -> Any:
        """What the mask of one item is read or drawn from: a file, or a record of its annotations; None without."""
        return self._masks[index]

    def mask(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Class values of one item, 255 = ignore; None where there is no mask."""
        raise NotImplementedError

    def pair(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]:
        """Image and mask of one item. Raises ToCoError where they differ in size: nothing is stretched to fit."""
        image, mask = self.image(index), self.mask(index)
        if mask is not None and mask.shape != image.shape[:2]:
            raise ToCoError(
                f"{self._mask_name(index)} is {mask.shape[0]} x {mask.shape[1]} but its image "
                f"{self._images[index].name} is {image.shape[0]} x {image.shape[1]}: a mask has the size of its image"
            )
        return image, mask

    def _mask_name(self, index: int) -> str:
        """Where the mask of one item comes from, for messages."""
        raise NotImplementedError

    def _label_row(self, index: int) -> UInt8[np.ndarray, " K"]:
        """Image-level labels of one item."""
        return self._label_from_mask(index)

    @property
    def image_labels(self) -> UInt8[np.ndarray, "N K"]:
        """Image-level labels in {0, 1}; derived on first use (which may read every mask once) and kept."""
        if self._image_labels is None:
            rows = np.zeros((len(self), self.n_classes), np.uint8)

            def fill(index: int) -> None:  # see `shown_row`
                rows[index] = self._label_row(index)

            map_files(fill, range(len(self)), what=f"labels of {self.split}")
            self._image_labels = rows
        return self._image_labels

    def subset(self, indices: Iterable[int]) -> "Split":
        """The same split with only these items, in this order."""
        indices = [int(i) for i in indices]
        if not indices:
            raise ToCoError(f"a subset of {self.root} [{self.split}] has no items: at least one is needed")
        part = copy.copy(self)
        part.names = tuple(self.names[i] for i in indices)
        part._images = [self._images[i] for i in indices]
        part._masks = [self._masks[i] for i in indices]
        part._image_labels = None if self._image_labels is None else self._image_labels[indices]
        return part

    def without(self, names: Collection[str]) -> "Split":
        """The same split without the items of these names, as far as it has them."""
        return self.subset(i for i, name in enumerate(self.names) if name not in names)

    def called(self, split: str) -> "Split":
        """The same items under another name of their split."""
        part = copy.copy(self)
        part.split = split
        return part

    def index_of(self, name: str) -> int:
        """The place of an item by its name, or by its number from 0 written as text. Raises ToCoError for another."""
        return index_of(name, self.names, f"{self.root.name} [{self.split}]")

    def spread(self, n: int, *, labelled: bool = False) -> "Split":
        """`n` items spread evenly over the split, all where it has fewer; `labelled`: of those that show a class, where
        any does."""
        places = np.flatnonzero(self.image_labels.any(1)) if labelled else np.arange(len(self))
        places = places if len(places) else np.arange(len(self))
        return self.subset(places[np.linspace(0, len(places) - 1, min(n, len(places))).round().astype(int)].tolist())

    def readable(self, *, progress: bool = True) -> "Split":
        """The same split without the items whose image or mask cannot be used; each is decoded once.

        What is wrong with them is in `left_out`, and is told by one warning. Raises ToCoError where nothing is left.
        """
        outcomes = attempt_files(self.look_at, range(len(self)), what=f"checking {self.split}", progress=progress)
        named = zip(self.names, outcomes, strict=True)
        left_out = {name: str(error) for name, (_, error) in named if error is not None}
        bad = [*left_out.values()]
        if not bad:
            return self
        if len(bad) == len(self):
            raise ToCoError(f"{bad[0]} (none of the {len(bad)} images of {self.root} [{self.split}] can be used)")
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        warnings.warn(
            f"{self.root} [{self.split}]: {len(bad)} of {len(self)} images are left out: {'; '.join(bad[:3])}{more}",
            stacklevel=2,
        )
        part = self.without(left_out)
        part.left_out = {**self.left_out, **left_out}
        return part

    def check(self, *, progress: bool = True) -> Report:
        """Decode every image and mask on several threads; report, or raise ToCoError naming the first bad file.

        Found here and not on opening: truncated or damaged files, masks whose size differs from the image's, mask
        values outside the classes, labels that do not fit. The derived labels are kept, so that checking costs nothing
        twice.
        """
        outcomes = attempt_files(self._check_one, range(len(self)), what=f"checking {self.split}", progress=progress)
        found = raise_first(outcomes)
        if self._image_labels is None and self.label_source == "masks" and None not in self._masks:
            self._image_labels = np.stack([shown_row(shown) for _, shown, _ in found])
        labels = self.image_labels
        sizes = sorted((size for size, _, _ in found), key=lambda size: size[0] * size[1])
        pixels = sum(h * w for (h, w), shown, _ in found if shown is not None)
        return Report(
            root=self.root,
            split=self.split,
            class_names=self.class_names,
            class_source=self.class_source,
            label_source=self.label_source,
            n_images=len(self),
            n_masks=self.n_masks,
            images_per_class=labels.sum(axis=0, dtype=np.int64),
            n_without_class=int((labels.sum(axis=1) == 0).sum()),
            void_share=sum(void for _, _, void in found) / pixels if pixels else float("nan"),
            smallest=sizes[0],
            largest=sizes[-1],
            left_out=tuple(self.left_out.values()),
        )

    def look_at(self, index: int, *, masks: bool = True) -> None:
        """Decode one image, and its mask unless told otherwise. Raises ToCoError where one cannot be used."""
        if masks:
            self._check_one(index)
        else:
            self.image(index)

    def _check_one(self, index: int) -> tuple[tuple[int, int], bytes | None, int]:
        """(H, W), the label row in bytes (see `shown_row`), number of void pixels."""
        image, mask = self.pair(index)
        return image.shape[:2], *self.mask_facts(mask, index)

    def mask_facts(self, mask: UInt8[np.ndarray, "H W"] | None, index: int) -> tuple[bytes | None, int]:
        """Classes that the mask of one item shows, a byte 0 or 1 for each (see `shown_row`), None without a mask; and
        the number of its void pixels. Raises ToCoError for a value that is no class."""
        if mask is None:
            return None, 0
        counts = self._count_values(mask, index)
        return (counts[1 : self.n_classes + 1] > 0).tobytes(), int(counts[IGNORE])

    def _count_values(self, mask: np.ndarray, index: int) -> np.ndarray:
        counts = np.bincount(mask.ravel(), minlength=256)
        wrong = [v for v in np.flatnonzero(counts).tolist() if self.n_classes < v != IGNORE]
        if wrong:
            raise ToCoError(
                f"{self._mask_name(index)} holds the value{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong))}: "
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


def shown_row(shown: bytes) -> UInt8[np.ndarray, " K"]:
    """K numbers in {0, 1} that were kept as bytes. An array for each of many images would lie between the pixels that
    go, whose memory is then of no use to the next image."""
    return np.frombuffer(shown, np.uint8)


class TrainVal(NamedTuple):
    """Two splits that share no name; `held_out` where the second was cut from the first one's list."""

    train: Split
    val: Split
    held_out: bool

    @property
    def val_name(self) -> str:
        """What reports call the second part: where it was cut from a list, they say so."""
        return HELD_OUT.format(self.val.split) if self.held_out else self.val.split


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


def joined(parts: Sequence[Split], split: str) -> Split:
    """The items of several splits of one data set as one split of that name.

    Raises ToCoError where they have other classes or the same name twice.
    """
    first = parts[0]
    if any(type(part) is not type(first) or part.class_names != first.class_names for part in parts):
        raise ToCoError(f"{first.root}: the splits {', '.join(p.split for p in parts)} have other classes or layouts")
    whole = copy.copy(first)
    whole.split, whole.names = split, tuple(name for part in parts for name in part.names)
    refuse_twice(whole.names, f"{first.root}: the splits {', '.join(p.split for p in parts)} have the image")
    whole.left_out = {name: reason for part in parts for name, reason in part.left_out.items()}
    whole._images = [path for part in parts for path in part._images]
    whole._masks = [mask for part in parts for mask in part._masks]
    whole._image_labels = np.concatenate([part.image_labels for part in parts])
    return whole


def index_of(name: str, names: Sequence[str], where: str) -> int:
    """The place of a name, or the place from 0 that is written as text. Raises ToCoError for another text."""
    if name in names:
        return names.index(name)
    if re.fullmatch(r"[0-9]{1,18}", name) and int(name) < len(names):
        return int(name)
    raise ToCoError(f"image = {name!r} is not in {where}: give a name or a number 0..{len(names) - 1}")


def listed_files(
    there: Mapping[str, Path], names: Sequence[str], folder: Path, list_name: str, *, kinds: str = ""
) -> list[Path]:
    """The files of names in a list, from those that are in a folder by `one_spelling`. Raises ToCoError with the first
    one that is missing, followed by `kinds`, and with how many more are."""
    missing = [name for name in names if one_spelling(name) not in there]
    if missing:
        more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise ToCoError(f"{folder / missing[0]}{kinds}, named in {list_name}, does not exist{more}")
    return [there[one_spelling(name)] for name in names]


def one_spelling(name: str) -> str:
    """One spelling for names that look alike: file systems differ in how they compose accents."""
    return unicodedata.normalize("NFC", name)


def inside_name(entry: Any, where: str, folder: str) -> str:
    """`entry` as a path below a folder, with `/`. Refuses everything that could lead out of it.

    `where` says in the message where the entry stands, `folder` which folder is meant.
    """
    if not isinstance(entry, str):
        raise ToCoError(f"{where}: {entry!r:.80} is not a name inside {folder}")
    parts = PurePosixPath(entry).parts
    refused = "absolute paths and '..' are refused" + (", and so is a backslash" if "\\" in entry else "")
    if not parts or entry.startswith("/") or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", entry):
        raise ToCoError(f"{where}: {entry!r:.200} is not a name inside {folder}; {refused}")
    utf8(entry, where)
    if max(len(part.encode()) for part in parts) > 240 or len(entry) > 1000:
        raise ToCoError(f"{where}: {entry!r:.80}... is too long for the name of a file")
    return PurePosixPath(entry).as_posix()


def utf8(text: str, where: str) -> str:
    """`text`, unless it cannot be written as UTF-8: a name from a file system in another encoding, half of a character
    in JSON. Lists, tables and figures have no way to hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ToCoError(f"{where}: {text!r:.200} is no text in UTF-8: rename it") from None
    return text


def split_name(entry: Any, where: str) -> str:
    """`entry` as the name of a split, which becomes the name of a list: one part, that cannot lead out of a folder."""
    if not isinstance(entry, str) or "/" in inside_name(entry, where, "the lists of splits") or not entry.isprintable():
        raise ToCoError(f"{where}: split {entry!r:.80} is not allowed: a plain name is wanted")
    return entry


def without_suffix(name: str) -> str:
    """A name without the suffix of an image file; other dots belong to the name."""
    path = PurePosixPath(name)
    bare = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
    return name if bare.name.strip(".") == "" else bare.as_posix()


def refuse_twice(names: Iterable[str], what: str) -> None:
    """Raise ToCoError for the first name that comes a second time; `what` has it."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ToCoError(f"{what} {name!r} more than once")
        seen.add(name)


def with_background(names: Sequence[str], source: str) -> tuple[str, ...]:
    """Class names with background first; refuses none, too many, and one twice."""
    names = [name.strip() for name in names if name.strip()]
    if not names or names[0].lower() not in BACKGROUND_NAMES:
        names = ["background", *names]
    names[0] = "background"
    if not 2 <= len(names) <= IGNORE:
        raise ToCoError(f"{source} names {len(names) - 1} classes besides background: 1..{IGNORE - 1} are allowed")
    refuse_twice(names, f"{source} names the class")
    return class_names_of(names, source)


def class_names_of(names: Iterable[str], source: str) -> tuple[str, ...]:
    """Names of classes, each a line of `classes.txt`; refuses one of several lines, or that is no text in UTF-8."""
    names = tuple(utf8(name, f"{source} names a class") for name in names)
    broken = [name for name in names if name.splitlines() != [name]]
    if broken:
        raise ToCoError(f"{source} names the class {broken[0]!r:.80}: one line of text is wanted")
    return names


def label_names(class_names: Sequence[str]) -> dict[int, str]:
    """Name the values of label maps above 0, for tools that know names only: the classes, and 255.

    Raises ToCoError for a class that is called as the latter is.
    """
    if IGNORED in class_names[1:]:
        raise ToCoError(f"class {IGNORED!r} is not allowed here: it is what {IGNORE} is called; rename the class")
    return {k: name for k, name in enumerate(class_names) if k} | {IGNORE: IGNORED}


def one_hot(present: Iterable[str], class_names: Sequence[str], source: Path | str) -> UInt8[np.ndarray, " K"]:
    """Class names as K numbers in {0, 1}; an unknown one is refused."""
    present = set(present)
    unknown = sorted(present - set(class_names[1:]))
    if unknown:
        raise ToCoError(f"{source} names the class {unknown[0]!r}: known are {', '.join(class_names[1:])}")
    return np.array([name in present for name in class_names[1:]], dtype=np.uint8)


def read_lines(path: Path, what: str) -> list[str]:
    """Lines of a UTF-8 text file, stripped, blank ones kept; `what` says in the message what it should be."""
    return [line.strip() for line in read_text(path, what).splitlines()]
