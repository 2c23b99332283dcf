"""One entry point for every layout: what a data set is follows from what lies in its folder.

open_source("VOCdevkit/VOC2012", "train_aug")       VOC layout       (see `voc`)
open_source("coco", "train")                        COCO's JSON      (see `coco`)
open_source("my_photos", "train")                   folder per class (see `tags`)
open_source("my_photos/tags.csv", "train")          list of tags     (see `tags`)
open_source("scenes", "train")                      the embedded data set
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from toco_core.config import DataConfig
from toco_core.data.layouts import coco, tags, voc
from toco_core.data.split import BROKEN, Split, TrainVal, holdout
from toco_core.errors import ToCoError

READERS = {
    "VOC": voc.VOCFolder,
    "COCO": coco.COCOFolder,
    "folder per class": tags.ClassFolders,
    "list of tags": tags.TagList,
}
ALLOWED = (
    "allowed are 'scenes'; JPEGImages/ with ImageSets/Segmentation/<split>.txt (VOC); annotations/instances_*.json or "
    "such a file (COCO); a folder per class; tags.csv or tags.json with file names and tags"
)


class Layout(NamedTuple):
    """What a data set was recognised as."""

    kind: str  # a key of READERS
    root: Path  # the folder, or the file of a COCO JSON or a list of tags
    splits: tuple[str, ...]


def recognise(dataset: Path | str) -> Layout:
    """The layout of a data set. Raises ToCoError that lists what was found and what is allowed."""
    with reading(dataset):
        kind, root = _kind(dataset)
        of = {"VOC": voc, "COCO": coco}.get(kind, tags)
        return Layout(kind, root, of.split_names(root))


def open_source(dataset: Path | str, split: str = "train", *, broken: str = "stop", **options) -> Split:
    """One split of a data set in any of the layouts.

    broken: "stop" leaves a broken file to whoever reads it first, which raises an error; "leave out" decodes every file
        once, now, and drops what cannot be used (see `Split.readable`).
    options: keywords of the reader. A VOC folder without masks, or with Annotations/ to take labels from, is opened
        with `require_masks=False` unless this says otherwise.

    Raises ToCoError for what is no data set, for an unknown split, and as the reader does.
    """
    if broken not in BROKEN:
        raise ToCoError(f"broken = {broken!r} is not allowed: one of {', '.join(map(repr, BROKEN))}")
    with reading(dataset):
        kind, root = _kind(dataset)
        if kind == "VOC":
            bare = not any(folder.is_dir() for folder in root.glob("SegmentationClass*"))
            options = {"require_masks": not (bare or (root / "Annotations").is_dir())} | options
        try:
            source = READERS[kind](root, split, **options)
        except TypeError as error:
            raise ToCoError(f"{root} ({kind}) cannot be opened with {', '.join(options)}: {error}") from error
    return source.readable() if broken == "leave out" else source


def open_unscored(dataset: Path | str, split: str) -> Split:
    """Open one split whose images may all be without masks, in any of the layouts: a test part may have none."""
    return open_source(dataset, split, **({"require_masks": False} if recognise(dataset).kind == "VOC" else {}))


@contextlib.contextmanager
def reading(dataset: Path | str) -> Iterator[None]:
    """What the system says about a folder that cannot be read, or a name that none can have, in our words."""
    try:
        yield
    except OSError as error:
        raise ToCoError(f"{str(error.filename or dataset):.200} cannot be read: {error.strerror or error}") from error


def split_names(dataset: Path | str) -> tuple[str, ...]:
    """The splits of a data set, sorted."""
    return recognise(dataset).splits


def open_train_val(
    dataset: Path | str,
    *,
    train: str = "train",
    val: str = "val",
    fraction: float = 0.2,
    seed: int = 0,
    broken: str = "stop",
    **options,
) -> TrainVal:
    """Both parts that training needs; where the data set has no split `val`, that part is cut from `train` by
    `holdout`.

    `broken` and `options` as in `open_source`. Raises ToCoError as it does, and where the two have other classes.
    """
    whole = open_source(dataset, train, broken=broken, **options)
    if val in split_names(dataset):
        other = open_source(dataset, val, broken=broken, **options)
        _refuse_other_classes(whole, other)
        return TrainVal(whole, other, False)
    kept, out = holdout(whole.names, fraction, seed)
    return TrainVal(whole.subset(kept), whole.subset(out), True)


def open_data(config: DataConfig, *, broken: str = "stop") -> TrainVal:
    """The two splits that a config names, `broken` as in `open_source`; the embedded data set is drawn first where it
    is not there yet."""
    return open_train_val(config.dataset, train=config.train_split, val=config.val_split, broken=broken)


def open_beside(source: Split, split: str) -> Split:
    """Open another split of the data set of one; its images may all be without masks.

    Raises ToCoError as `open_source` does, and where its classes are others.
    """
    part = open_unscored(source.root, split)
    _refuse_other_classes(source, part)
    return part


def _refuse_other_classes(first: Split, other: Split) -> None:
    """Raise ToCoError where two splits of a data set have other classes: a number would mean another one in each."""
    if other.class_names != first.class_names:
        raise ToCoError(
            f"{first.root}: {first.split} has the classes {', '.join(first.class_names[1:])} "
            f"but {other.split} has {', '.join(other.class_names[1:])}"
        )


def _kind(dataset: Path | str) -> tuple[str, Path]:
    if dataset == "scenes":
        from toco_core.data.scenes import scenes_folder

        return "VOC", scenes_folder()
    root = Path(dataset)
    if root.is_file():
        if root.suffix.lower() in tags.LIST_SUFFIXES:
            is_coco = root.suffix.lower() == ".json" and coco.is_coco_json(root)
            return ("COCO" if is_coco else "list of tags"), root
        raise ToCoError(f"dataset {root} is a file that is neither .csv, .tsv nor .json; {ALLOWED}")
    if not root.is_dir():
        raise ToCoError(f"dataset folder {root} does not exist; {ALLOWED}")
    if (root / "ImageSets").is_dir():
        return "VOC", root
    if coco.is_coco_folder(root):  # before JPEGImages: its images may lie in a folder of that name, too
        return "COCO", root
    if (root / "JPEGImages").is_dir():
        return "VOC", root
    listed = tags.tag_file(root)
    if listed is not None:
        return "list of tags", listed
    inside = [child for child in sorted(root.iterdir()) if child.is_dir() and (child / "JPEGImages").is_dir()]
    if inside:
        raise ToCoError(f"dataset {root} holds {_found(root)}; did you mean {inside[0]}?")
    if tags.is_class_folders(root):
        return "folder per class", root
    raise ToCoError(f"dataset {root} holds {_found(root)}; {ALLOWED}")


def _found(root: Path) -> str:
    """What lies in a folder, in a few words."""
    entries = sorted(root.iterdir())
    folders = [p.name + "/" for p in entries if p.is_dir()]
    files = Counter(p.suffix.lower() or p.name for p in entries if p.is_file())
    words = [", ".join(folders[:5]) + (f" and {len(folders) - 5} more folders" if len(folders) > 5 else "")]
    words += [f"{n} {suffix} file{'s' * (n > 1)}" for suffix, n in files.most_common(5)]
    return ", ".join(word for word in words if word) or "nothing"
