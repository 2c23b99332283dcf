"""Look a data set over before training on it: what is there and what is missing, broken files, duplicates, leaks.

`inventory` counts folders and lists, and says for VOC and COCO how many there should be and where the rest comes from.
`survey` decodes everything once. From a shell, both: `toco check <folder>`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from toco_core.data.files import IMAGE_SUFFIXES, MASK_SUFFIXES, attempt_files, index_files, unused_images
from toco_core.data.layouts import coco
from toco_core.data.layouts.sbd import sbd_folder
from toco_core.data.layouts.voc import AUGMENTED, VOC_CLASSES, VOCFolder
from toco_core.data.source import Layout, open_source, open_train_val, open_unscored, recognise
from toco_core.data.split import HELD_OUT, Split, one_spelling, shown_row, without_suffix
from toco_core.errors import ToCoError, one_line
from toco_core.machine.intake import read_bytes, read_json

GRID = 16  # a fingerprint compares neighbours on a grid of GRID x GRID: GRID * GRID bits
NEAR = 16  # bits in which two pictures of the same may differ; unrelated photographs differ in 56 or more
MOST = 10  # pairs, masks or files that a report names; it counts the others
NESTED = (
    {"train", "trainval"}, {"val", "trainval"}, {"train", "train_aug"}, {"train_aug", "trainval"},
    {"val", coco.VAL_PART},
)  # fmt: skip
CUT_FROM = {HELD_OUT.format("train"): "train"}
OF_OTHERS = {"all", "corrected"}  # what `toco export --split all` and `toco corrected` list besides other lists
VOC_HOME = "VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012"
SBD_HOME = (
    "SBD, benchmark.tgz from www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours, "
    "unpacked beside this folder as it is"
)
COCO_HOME = "images.cocodataset.org/zips"


class InventoryItem(NamedTuple):
    """One thing that a data set holds or should hold."""

    what: str
    found: int
    expected: int | None  # None: nobody knows
    how: str  # where it comes from, where it is known

    def __str__(self) -> str:
        known = "" if self.expected in (None, self.found) else f" of {self.expected}"
        get = f"   get: {self.how}" if self.how and self.expected is not None and self.found < self.expected else ""
        return f"{self.what:44}{'missing' if not self.found else f'{self.found}{known}':>16}{get}"


class Inventory(NamedTuple):
    """What `inventory` found."""

    layout: Layout
    entries: tuple[InventoryItem, ...]
    unused: tuple[str, ...] = ()  # pictures that no split has, each with the reason

    @property
    def missing(self) -> tuple[InventoryItem, ...]:
        """What there is less of than there should be."""
        return tuple(e for e in self.entries if e.expected is not None and e.found < e.expected)

    def __str__(self) -> str:
        head = f"{self.layout.root}: {self.layout.kind}, splits {', '.join(self.layout.splits) or 'none'}"
        unused = [f"not used: {len(self.unused)}", *_first(self.unused)] if self.unused else []
        return "\n".join([head, *map(str, self.entries), *unused])


class OddMask(NamedTuple):
    """A mask that says something else than the labels of its image."""

    name: str
    others: tuple[str, ...]  # classes that it shows and the labels do not have; none: it shows no class at all
    void_share: float  # of its pixels

    def __str__(self) -> str:
        if self.others:
            return f"{self.name}: the mask shows {', '.join(self.others)}, which the labels do not have"
        void = f"; 255 is void and no class: {self.void_share:.1%} of its pixels" if self.void_share else ""
        return f"{self.name}: the image has labels, but the mask shows no class{void}"


class SplitSurvey(NamedTuple):
    """One split, after every file of it was decoded."""

    split: str
    names: tuple[str, ...]  # of the readable images
    sizes: Int64[np.ndarray, "N 2"]  # H, W of each
    class_names: tuple[str, ...]
    images_per_class: Int64[np.ndarray, " K"]
    n_without_class: int
    n_masks: int
    unreadable: tuple[str, ...]  # what is wrong with each of the others
    outside: tuple[str, ...] = ()  # names of images that are links out of the data set
    labelled: bool = True  # off: there is neither a mask nor anything else that labels its images
    void_share: float = float("nan")  # of all mask pixels; nan without masks
    odd_masks: tuple[OddMask, ...] = ()  # files whose labels come from elsewhere, and differ


class DuplicatePair(NamedTuple):
    """Two pictures that show the same."""

    one: tuple[str, str]  # split, name
    other: tuple[str, str]
    bits: int  # in which their fingerprints differ; -1 where every pixel is equal
    same_labels: bool  # or those of one are unknown

    def __str__(self) -> str:
        other = "" if self.same_labels else ", with different labels"
        return f"{'/'.join(self.one)} = {'/'.join(self.other)}{other}"


class Survey(NamedTuple):
    """What `survey` found in one or more splits."""

    parts: tuple[SplitSurvey, ...]
    same: tuple[DuplicatePair, ...]

    @property
    def leaks(self) -> tuple[DuplicatePair, ...]:
        """Pairs of which one is in another split than the other: what is scored was learned from.

        Lists that hold each other by design (`NESTED`, `OF_OTHERS`) share their images, and what comes twice in the
        longer one is a duplicate there.
        """
        names = {part.split: set(part.names) for part in self.parts}
        return tuple(pair for pair in self.same if pair.one[0] != pair.other[0] and not _is_shared(pair, names))

    @property
    def duplicates(self) -> tuple[DuplicatePair, ...]:
        """Pairs within one split."""
        return tuple(pair for pair in self.same if pair.one[0] == pair.other[0])

    @property
    def odd_masks(self) -> tuple[OddMask, ...]:
        """Masks that contradict the labels, of all splits."""
        return tuple(mask for part in self.parts for mask in part.odd_masks)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """What is wrong with each file that cannot be used."""
        return tuple(message for part in self.parts for message in part.unreadable)

    def __str__(self) -> str:
        lines = []
        for part in self.parts:
            named = zip(part.class_names[1:], part.images_per_class.tolist(), strict=True)
            labels = f"{part.n_without_class} of no class; " + ", ".join(f"{name} {n}" for name, n in named)
            void = f"; {part.void_share:.1%} of the mask pixels void" if part.n_masks else ""
            lines.append(
                f"{part.split}: {len(part.names)} images, {part.n_masks} masks, "
                f"{labels if part.labelled else 'no image labels'}{void}"
            )
            if part.odd_masks:
                numbers = ", ".join(f"{k} {name}" for k, name in enumerate(part.class_names[1:], start=1))
                lines.append(f"masks of {part.split} that contradict the labels: {len(part.odd_masks)} ({numbers})")
                lines += _first(part.odd_masks)
        lines.append(f"unreadable: {len(self.unreadable)}" + "".join(f"\n  {m}" for m in self.unreadable))
        outside = [f"{part.split}/{name}" for part in self.parts for name in part.outside]
        if outside:
            lines.append(f"links that lead out of the data set: {len(outside)}, the first is {outside[0]}")
        for title, pairs in (("duplicates within a split", self.duplicates), ("leaks between splits", self.leaks)):
            lines += [f"{title}: {len(pairs)}", *_first(pairs)]
        return "\n".join(lines)


def surveyed_splits(dataset: Path | str, names: Sequence[str] = ()) -> list[Split]:
    """Open the splits to survey: those named, or else all. Where no list is called val, all has train in the two parts
    that training cuts it into (`open_train_val`): what is held out must not be learned from either."""
    known = recognise(dataset).splits
    cut = not names and "train" in known and "val" not in known
    found: list[Split] = []
    for name in names or known:
        if cut and name == "train":
            parts = open_train_val(dataset)
            found += [parts.train, parts.val.called(parts.val_name)]
        else:
            found.append((open_unscored if name == "test" else open_source)(dataset, name))
    return found


def survey(splits: Sequence[Split], *, near: int = NEAR, progress: bool = True) -> Survey:
    """Decode every image and mask of some splits; find what is broken and what comes twice.

    Two pictures are the same where at most `near` of the 256 bits of their fingerprints differ, see `fingerprint`;
    another size or stronger compression changes few of them. Nothing is raised for a broken file: it is listed.
    """
    parts, prints, exact, origin, labels = [], [], [], [], []
    for source in splits:
        outcomes = attempt_files(
            lambda i, source=source: _looked_at(source, i),
            range(len(source)),
            what=f"looking at {source.split}",
            progress=progress,
        )
        good = [i for i, (_, error) in enumerate(outcomes) if error is None]
        labelled = source.n_masks > 0 or source.label_source != "masks"
        items = [outcomes[i][0] for i in good]
        if not good or not labelled:
            rows = np.zeros((len(good), source.n_classes), np.uint8)
        elif source.label_source == "masks":  # which are decoded already
            rows = np.stack([shown_row(item.shown) for item in items])
        else:
            rows = source.subset(good).image_labels
        for row, i, item in zip(rows, good, items, strict=True):
            prints.append(np.frombuffer(item.bits, np.uint64))
            exact.append(item.digest)
            origin.append((source.split, source.names[i]))
            labels.append(row if labelled else None)
        pixels = sum(item.size[0] * item.size[1] for item in items if item.shown is not None)
        parts.append(
            SplitSurvey(
                split=source.split,
                names=tuple(source.names[i] for i in good),
                sizes=np.array([item.size for item in items], np.int64).reshape(-1, 2),
                class_names=source.class_names,
                images_per_class=rows.sum(0, dtype=np.int64),
                n_without_class=int((rows.sum(1) == 0).sum()),
                n_masks=source.subset(good).n_masks if good else 0,
                unreadable=tuple(str(error) for _, error in outcomes if error is not None),
                outside=tuple(source.names[i] for i in source.outside()),
                labelled=labelled,
                void_share=sum(item.n_void for item in items) / pixels if pixels else float("nan"),
                odd_masks=tuple(_odd_masks(source, good, rows, items)),
            )
        )
    same = [
        DuplicatePair(origin[i], origin[j], -1 if exact[i] == exact[j] else bits, _agree(labels[i], labels[j]))
        for i, j, bits in near_pairs(np.array(prints, np.uint64).reshape(len(prints), GRID * GRID // 64), near)
    ]
    return Survey(tuple(parts), tuple(same))


def fingerprint(image: np.ndarray) -> UInt64[np.ndarray, " words"]:
    """256 bits of a picture: on a grid of 16 x 17 grey means, whether each is brighter than its left neighbour.

    Size, compression and brightness hardly change it; turning, mirroring and cropping do.
    """
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey.astype(np.float32), (GRID + 1, GRID), interpolation=cv2.INTER_AREA)
    return np.packbits(np.diff(small, axis=1) > 0).view(np.uint64)


def near_pairs(prints: UInt64[np.ndarray, "N words"], near: int) -> list[tuple[int, int, int]]:
    """(i, j, number of different bits), i < j, of all pairs of fingerprints that differ in at most `near` bits."""
    found, first = [], np.ascontiguousarray(prints[:, 0])
    for i in range(len(prints) - 1):
        close = np.flatnonzero(np.bitwise_count(first[i + 1 :] ^ first[i]) <= near) + i + 1  # few are, in one word
        bits = np.bitwise_count(prints[close] ^ prints[i]).sum(1, dtype=np.int64)
        found += [(i, j, n) for j, n in zip(close.tolist(), bits.tolist(), strict=True) if n <= near]
    return found


class _DecodedItem(NamedTuple):
    """One image and its mask, decoded. Bytes and no arrays, see `shown_row`."""

    size: tuple[int, int]  # H, W
    bits: bytes  # of `fingerprint`
    digest: bytes
    shown: bytes | None  # the classes of its mask, of `Split.mask_facts`
    n_void: int


def _looked_at(source: Split, index: int) -> _DecodedItem:
    image, mask = source.pair(index)
    shown, n_void = source.mask_facts(mask, index)
    if source.n_masks and source.label_source == "masks" and source.mask_source(index) is None:
        raise ToCoError(f"{source.image_path(index)} has no mask to derive its image labels from")
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
    return _DecodedItem(image.shape[:2], fingerprint(image).tobytes(), digest, shown, n_void)


def _odd_masks(
    source: Split, indices: Sequence[int], rows: UInt8[np.ndarray, "N K"], items: Sequence[_DecodedItem]
) -> Iterator[OddMask]:
    """The masks of some items that contradict the image labels `rows`: of files, as drawn ones follow from the labels'
    own source."""
    for i, row, item in zip(indices, rows, items, strict=True):
        if item.shown is None or not isinstance(source.mask_source(i), Path):
            continue
        shown = shown_row(item.shown)
        others = np.flatnonzero(shown > row)
        if len(others) or (row.any() and not shown.any()):
            names = tuple(source.class_names[k + 1] for k in others)
            yield OddMask(source.names[i], names, item.n_void / (item.size[0] * item.size[1]))


def _first(things: Sequence) -> list[str]:
    """Lines that name the first of some things and count the others."""
    more = [f"  and {len(things) - MOST} more"] if len(things) > MOST else []
    return [*(one_line(f"  {thing}") for thing in things[:MOST]), *more]


def _is_shared(pair: DuplicatePair, names: Mapping[str, set[str]]) -> bool:
    """Whether two lists hold each other by design, and both pictures are in one of them; `names` are those of each."""
    parts = {pair.one[0], pair.other[0]}
    lists = {CUT_FROM.get(part, part) for part in parts}
    by_design = lists in NESTED or lists & OF_OTHERS
    return bool(by_design) and any({pair.one[1], pair.other[1]} <= names[part] for part in parts)


def _agree(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether two rows of labels are equal, as far as both are known."""
    return one is None or other is None or bool(np.array_equal(one, other))


def inventory(dataset: Path | str) -> Inventory:
    """Count what a data set holds, without decoding anything. Raises ToCoError for what is no data set."""
    layout = recognise(dataset)
    entries = {"VOC": _voc_entries, "COCO": _coco_entries}.get(layout.kind, _other_entries)(layout)
    return Inventory(layout, tuple(entries), tuple(_unused(layout)))


def _unused(layout: Layout) -> Iterator[str]:
    """The pictures that are passed over, where a layout takes all of a folder or names them without suffix: the others
    name files."""
    folder = {"VOC": layout.root / "JPEGImages", "folder per class": layout.root}.get(layout.kind)
    for path, reason in unused_images(folder).items() if folder else ():
        if folder != layout.root or path.relative_to(folder).parts[0] != "masks":
            yield f"{path}: {reason}"


def _voc_entries(layout: Layout) -> list[InventoryItem]:
    root = layout.root
    try:
        official = any(VOCFolder(root, s, require_masks=False).class_source == "PASCAL VOC" for s in layout.splits[:1])
    except ToCoError:
        official = False
    folders = [
        ("JPEGImages/", root / "JPEGImages", IMAGE_SUFFIXES, 17125, VOC_HOME),
        ("Annotations/", root / "Annotations", (".xml",), 17125, VOC_HOME),
        ("SegmentationClass/", root / "SegmentationClass", MASK_SUFFIXES, 2913, VOC_HOME),
    ]
    sbd = sbd_folder(root)
    if sbd is None or (root / AUGMENTED).is_dir():
        folders.append((f"{AUGMENTED}/", root / AUGMENTED, MASK_SUFFIXES, 12031, SBD_HOME))
    else:
        folders.append(("SBD cls/*.mat", sbd, (".mat",), 11355, SBD_HOME))
    lists = {"train": 1464, "val": 1449, "train_aug": 10582}
    entries = []
    for what, folder, kinds, number, how in folders:
        found = len(index_files(folder, kinds, hidden=False))
        if found or official:
            entries.append(InventoryItem(what, found, number if official else None, how))
    for split in dict.fromkeys([*layout.splits, *(lists if official else ())]):
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        found = _count_lines(path)
        if split in layout.splits and not path.is_file():
            found = len(VOCFolder(root, split, require_masks=False))
        how = f"follows from SBD, or from masks in {AUGMENTED}/" if split == "train_aug" else VOC_HOME
        entries.append(
            InventoryItem(f"ImageSets/Segmentation/{split}.txt", found, lists.get(split) if official else None, how)
        )
    return entries if official else [*entries, _classes_entry(root)]


def _coco_entries(layout: Layout) -> list[InventoryItem]:
    root = layout.root
    paths = (
        [root] if root.is_file() else sorted([*root.glob("annotations/instances_*.json"), *root.glob("instances_*")])
    )
    full = {"train2014": 82783, "val2014": 40504}
    entries, official = [], any(p.stem.endswith(("train2014", "val2014")) for p in paths)
    for path in paths:
        year = path.stem.removeprefix("instances_")
        try:
            content = read_json(path, "annotation_bytes")
            counts = {key: len(content[key]) for key in ("images", "annotations", "categories")}
        except ToCoError:
            raise
        except (KeyError, TypeError) as error:
            raise ToCoError(f"{path} is not COCO's JSON: {error}") from error
        real = counts["categories"] == 80
        entries.append(InventoryItem(f"{path.name}: images", counts["images"], full.get(year) if real else None, ""))
        entries.append(InventoryItem(f"{path.name}: annotations", counts["annotations"], None, ""))
        entries.append(InventoryItem(f"{path.name}: categories", counts["categories"], None, ""))
        if root.is_dir():
            folder, there = _images_of(path, root, content["images"])
            how = f"{COCO_HOME}/{year}.zip" if year in full else ""
            entries.append(InventoryItem(folder, there, counts["images"], how))
    if official and root.is_dir():
        for year in sorted(set(full) - {p.stem.removeprefix("instances_") for p in paths}):
            how = f"images.cocodataset.org/annotations/annotations_trainval2014.zip and {COCO_HOME}/{year}.zip"
            entries.append(InventoryItem(f"annotations/instances_{year}.json", 0, 1, how))
    return entries


def _images_of(path: Path, root: Path, images: Iterable) -> tuple[str, int]:
    """The folder with the images that an annotation file names, the usual one if there is none, and how many it has."""
    named = {without_suffix(str(image.get("file_name"))) for image in images if isinstance(image, dict)}
    named = {one_spelling(name) for name in named}
    for below in coco.image_folders(path):
        there = named & {one_spelling(name) for name in index_files(root / below, IMAGE_SUFFIXES)}
        if there:
            return f"{below}/", len(there)
    return f"{coco.image_folders(path)[0]}/", 0


def _other_entries(layout: Layout) -> list[InventoryItem]:
    folder = layout.root if layout.root.is_dir() else layout.root.parent
    images = index_files(folder, IMAGE_SUFFIXES, hidden=False)
    images = {name: path for name, path in images.items() if not name.startswith("masks/")}
    entries = [InventoryItem("images", len(images), None, "")]
    if layout.root.is_dir():
        below = Counter(path.parent.relative_to(folder).as_posix() for path in images.values())
        entries += [InventoryItem(f"{name}/", n, None, "") for name, n in sorted(below.items()) if name != "."]
    masks = len(index_files(folder / "masks", MASK_SUFFIXES, hidden=False))
    return [*entries, InventoryItem("masks/ (optional)", masks, None, ""), _classes_entry(folder)]


def _classes_entry(folder: Path) -> InventoryItem:
    return InventoryItem("classes.txt (optional)", _count_lines(folder / "classes.txt"), None, "")


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    text = read_bytes(path, "text_bytes").decode("utf-8-sig", errors="replace")
    return sum(bool(line.strip()) for line in text.splitlines())


def how_to_get(name: str) -> str:
    """Where a published data set comes from, in one line; empty for others."""
    if "VOC" in name.upper():
        return f"PASCAL VOC 2012, {len(VOC_CLASSES) - 1} classes: {VOC_HOME}; {SBD_HOME}"
    if "COCO" in name.upper():
        return f"MS COCO 2014: {COCO_HOME}/train2014.zip, val2014.zip, annotations/annotations_trainval2014.zip"
    return ""
