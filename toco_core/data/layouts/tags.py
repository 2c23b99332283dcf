"""Your own photographs, with tags instead of masks.

A folder per class, where `background` holds images of no class:

    root/<class>/<image>                     or root/train/<class>/<image>, root/val/<class>/<image>
    root/masks/<class>/<image>.png           (optional) 0 background, 1..K, 255 = ignore

Or a table or JSON of file names and tags, each path inside the file's own folder:

    file,tags,split,mask                     tags.csv (or .tsv); tags separated by ; or |; split and mask optional
    a.jpg,cat;dog,train,masks/a.png
    file,cat,dog                             or a column per class with 0 and 1
    {"a.jpg": ["cat", "dog"]}                tags.json
    [{"file": "a.jpg", "tags": ["cat"]}]     or with "split" and "mask", too

Without splits all images are "train". The classes are those that occur, sorted, unless `classes.txt` beside names them.
"""

import csv
import functools
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from toco_core.data.files import (
    HIDDEN_FOLDERS,
    IMAGE_SUFFIXES,
    MASK_SUFFIXES,
    index_files,
    named_files,
    read_mask,
)
from toco_core.data.split import (
    BACKGROUND_NAMES,
    Split,
    inside_name,
    one_hot,
    one_spelling,
    read_lines,
    refuse_twice,
    split_name,
    utf8,
    with_background,
    without_suffix,
)
from toco_core.errors import ToCoError
from toco_core.machine.intake import read_json, read_text, real_path
from toco_core.machine.writing import whole_folder, writing

TABLES = ("tags.csv", "tags.tsv", "tags.json", "labels.csv", "labels.tsv", "labels.json")
LIST_SUFFIXES = (".csv", ".tsv", ".json")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path", "name")
TAG_COLUMNS = ("tags", "tag", "labels", "label", "classes", "class")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLITS["testing"] = "test"
CLASS_LAYOUT = "a folder per class holds <class>/<image>, or train/<class>/<image> and val/<class>/<image>"
TABLE_LAYOUT = "a table has the columns file and tags (a;b), or file and a column of 0 and 1 per class"


class Tagged(NamedTuple):
    """One image and what is known of it."""

    name: str
    file: str  # below the folder
    tags: tuple[str, ...]
    split: str | None
    mask: str | None


class _TaggedImages(Split):
    """What both layouts share."""

    def _fill(self, folder: Path, entries: Sequence[Tagged], split: str, source: str) -> None:
        """The items of a split; classes are those of all splits."""
        self.split, self.label_source = split, source
        known = _split_names(entries)
        if split not in known:
            raise ToCoError(f"split {split!r} is not in {self.root}: there is {', '.join(known)}")
        self.class_names, self.class_source = _classes(folder, entries, source)
        here = [entry for entry in entries if (entry.split or "train") == split]
        self.names = tuple(entry.name for entry in here)
        refuse_twice(self.names, f"{self.root} [{split}] has the image")
        self._images = [folder / entry.file for entry in here]
        self._masks = [None if entry.mask is None else folder / entry.mask for entry in here]
        tags = [[t for t in entry.tags if t.lower() not in BACKGROUND_NAMES] for entry in here]
        where = [f"{self.root}: {entry.file}" for entry in here]
        self._image_labels = np.stack([one_hot(t, self.class_names, w) for t, w in zip(tags, where, strict=True)])

    def mask(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Class values of one item, 255 = ignore; None where there is no mask."""
        return None if self._masks[index] is None else read_mask(self._masks[index])

    def _mask_name(self, index: int) -> str:
        return str(self._masks[index])


class ClassFolders(_TaggedImages):
    """One split of a folder that holds a folder per class. An image has the one class that its folder names."""

    def __init__(self, root: Path | str, split: str = "train"):
        self.root = Path(root)
        self._fill(self.root, folder_entries(self.root), split, "the folders")


class TagList(_TaggedImages):
    """One split of images that a CSV, TSV or JSON file tags, see the module. `root` is that file."""

    def __init__(self, root: Path | str, split: str = "train"):
        self.root = Path(root)
        entries = _from_json(self.root) if self.root.suffix.lower() == ".json" else _from_table(self.root)
        if not entries:
            raise ToCoError(f"{self.root} names no image")
        folder = self.root.parent
        spelled = functools.cache(lambda: _spelled_files(folder))  # rarely asked for: a list usually spells as the disk
        self._fill(folder, [_resolved(folder, e, self.root, spelled) for e in entries], split, self.root.name)


def split_names(root: Path | str) -> tuple[str, ...]:
    """The splits of a folder per class (a folder) or of a list of tags (a file)."""
    root = Path(root)
    if root.is_dir():
        return _split_names(folder_entries(root))
    return _split_names(_from_json(root) if root.suffix.lower() == ".json" else _from_table(root))


def tag_file(folder: Path) -> Path | None:
    """The list of tags in a folder, be it a file that can be read or not."""
    places = (folder / name for name in TABLES)
    return next((path for path in places if os.path.lexists(path) and not os.path.isdir(path)), None)


def is_class_folders(root: Path) -> bool:
    """Whether there are folders with images, directly or below train, val and so on."""
    return any(_has_images(folder) for level in _levels(root) for folder in _folders(level))


def _split_names(entries: Sequence[Tagged]) -> tuple[str, ...]:
    return tuple(sorted({entry.split or "train" for entry in entries}))


def _folders(root: Path) -> list[Path]:
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(HIDDEN_FOLDERS)]
    return [refuse_outside(p, root) for p in folders if p.name != "masks"]


def _levels(root: Path) -> list[Path]:
    """The folders that hold the folders of the classes: those named like splits, or the root itself."""
    parts = [p for p in _folders(root) if p.name.lower() in SPLITS and not _has_images(p)]
    return parts or [root]


def refuse_outside(folder: Path, root: Path) -> Path:
    """`folder`, unless it is a link that leads out of `root`: all that lies below it would become training images, and
    an export would hand it on."""
    if folder.is_symlink() and not real_path(folder).is_relative_to(real_path(root)):
        raise ToCoError(f"{folder} is a link to {real_path(folder)}, outside of {root}: put the folder itself there")
    return folder


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") for p in folder.iterdir())


def folder_entries(root: Path) -> list[Tagged]:
    """The images of a folder per class, each with the one tag that its folder names."""
    found = index_files(refuse_outside(root / "masks", root), MASK_SUFFIXES)
    masks = {one_spelling(name): path for name, path in found.items()}
    entries = []
    for level in _levels(root):
        split = None if level == root else SPLITS[level.name.lower()]
        for folder in _folders(level):
            for below, path in sorted(index_files(folder, IMAGE_SUFFIXES, hidden=False).items()):
                name = utf8((folder.relative_to(root) / below).as_posix(), str(root))
                mask = masks.get(one_spelling(name))
                mask = None if mask is None else mask.relative_to(root).as_posix()
                entries.append(Tagged(name, path.relative_to(root).as_posix(), (folder.name,), split, mask))
    if not entries:
        raise ToCoError(f"dataset folder {root} has no images in folders; {CLASS_LAYOUT}")
    return entries


def _classes(folder: Path, entries: Sequence[Tagged], source: str) -> tuple[tuple[str, ...], str]:
    if (folder / "classes.txt").is_file():
        path = folder / "classes.txt"
        return with_background(read_lines(path, "a list of classes"), str(path)), "classes.txt"
    names = sorted({tag for entry in entries for tag in entry.tags if tag.lower() not in BACKGROUND_NAMES})
    if not names:
        raise ToCoError(f"{source} of {folder} names no class: every image would be background")
    return with_background(names, source), source


def _from_table(path: Path) -> list[Tagged]:
    text = read_text(path, "a list of tags")
    first = text.splitlines()[0] if text.strip() else ""
    delimiter = max(",;\t", key=first.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if any(row)]
    except csv.Error as error:
        raise ToCoError(f"{path} cannot be read as a table: {error}") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    lower = [cell.lower() for cell in header]
    file_at = next((lower.index(c) for c in FILE_COLUMNS if c in lower), None)
    if file_at is None:
        raise ToCoError(
            f"{path} has no column {FILE_COLUMNS[0]!r} but {', '.join(header) or 'nothing'}; {TABLE_LAYOUT}"
        )
    tags_at = next((lower.index(c) for c in TAG_COLUMNS if c in lower), None)
    special = {lower.index(c): c for c in ("split", "mask") if c in lower}
    entries = []
    for number, row in enumerate(rows[1:], start=2):
        where = f"{path} row {number}"
        if len(row) != len(header):
            raise ToCoError(f"{where} has {len(row)} columns, the header has {len(header)}")
        cells = [cell.strip() for cell in row]
        if tags_at is None:
            chosen = [i for i in range(len(header)) if i != file_at and i not in special]
            tags = tuple(header[i] for i in chosen if _is_one(cells[i], header[i], where))
        else:
            tags = _tags_of(cells[tags_at])
        extra = {name: cells[i] or None for i, name in special.items()}
        entries.append(_entry(cells[file_at], tags, extra, where))
    return entries


def _tags_of(text: str) -> tuple[str, ...]:
    """The tags that one text names."""
    return tuple(tag.strip() for tag in re.split(r"[;|,]", text) if tag.strip())


def _is_one(cell: str, column: str, where: str) -> bool:
    if cell not in ("0", "1"):
        raise ToCoError(f"{where}: {column} = {cell!r}, 0 or 1 is wanted; {TABLE_LAYOUT}")
    return cell == "1"


def _from_json(path: Path) -> list[Tagged]:
    content = read_json(path)
    if isinstance(content, Mapping):
        content = [{"file": file, "tags": tags} for file, tags in content.items()]
    if not isinstance(content, list):
        raise ToCoError(f'{path} holds a {type(content).__name__}: {{"file": [tags]}} or a list of objects is wanted')
    entries = []
    for number, entry in enumerate(content):
        where = f"{path} entry {number}"
        if not isinstance(entry, Mapping):
            raise ToCoError(f"{where} is {entry!r:.60}: an object with file and tags is wanted")
        file = next((entry[c] for c in FILE_COLUMNS if c in entry), None)
        tags = next((entry[c] for c in TAG_COLUMNS if c in entry), None)
        tags = list(_tags_of(tags)) if isinstance(tags, str) else tags
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ToCoError(f"{where} has the tags {tags!r:.60}: a list of texts is wanted")
        entries.append(_entry(file, tuple(tag.strip() for tag in tags if tag.strip()), entry, where))
    return entries


def _entry(file: Any, tags: tuple[str, ...], extra: Mapping, where: str) -> Tagged:
    split, mask = extra.get("split"), extra.get("mask")
    split = None if split is None else split_name(split, where)
    file = _inside(file, where)
    mask = None if mask is None else _inside(mask, where)
    split = None if split is None else SPLITS.get(split.lower(), split)
    return Tagged(without_suffix(file), file, tags, split, mask)


def _inside(entry: Any, where: str) -> str:
    """A path in a list, whose folders Windows separates by a backslash, as one below the list's folder."""
    return inside_name(entry.replace("\\", "/") if isinstance(entry, str) else entry, where, "the list's folder")


def _resolved(folder: Path, entry: Tagged, path: Path, spelled: Callable[[], Mapping[str, str]]) -> Tagged:
    """The entry with its files as the disk has them, its name as the list spells it; refuses a file that is not there.

    `spelled` is asked for `_spelled_files` where a file is not there as the list spells it.
    """
    found = _find(folder, [entry.file, *(entry.file + suffix for suffix in IMAGE_SUFFIXES)], spelled)
    if found is None:
        raise ToCoError(f"{folder / entry.file}, named in {path.name}, does not exist")
    name, file = found
    if not file.lower().endswith(IMAGE_SUFFIXES):
        raise ToCoError(f"{path} names {entry.file!r}: allowed are {', '.join(IMAGE_SUFFIXES)}")
    entry = entry._replace(name=without_suffix(name), file=file)
    if entry.mask is None:
        return entry
    found = _find(folder, [entry.mask], spelled)
    if found is None:
        raise ToCoError(f"{folder / entry.mask}, a mask named in {path.name}, does not exist")
    return entry._replace(mask=found[1])


def _find(folder: Path, names: Sequence[str], spelled: Callable[[], Mapping[str, str]]) -> tuple[str, str] | None:
    """The first of some names that a file below a folder has, and that file as the disk spells it."""
    for name in names:
        if (folder / name).is_file():
            return name, name
    known = spelled()
    return next(((name, known[key]) for name in names if (key := _same_spelling(name)) in known), None)


def _spelled_files(folder: Path) -> dict[str, str]:
    """`_same_spelling` of each image below a folder -> its path there, with `/`."""
    files = (path.relative_to(folder).as_posix() for _, path in reversed(named_files(folder, IMAGE_SUFFIXES)))
    return {_same_spelling(file): file for file in files}


def _same_spelling(file: str) -> str:
    """One spelling of a file for a list of any system: composed accents, its suffix in small letters."""
    suffix = PurePosixPath(file).suffix
    return one_spelling(file.removesuffix(suffix) + suffix.lower())


def write_tag_list(folder: Path, splits: Mapping[str, Split], *, masks: Sequence[str] = ()) -> Path:
    """Write splits of any data set as photographs with a list of tags; returns the list, `folder`/tags.csv.

    masks: names of the splits whose masks are written, too, to `folder`/masks. Images are stored as PNG, unchanged.
    Raises ToCoError for a folder that exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ToCoError(f"{folder} is not empty: a list of tags is written to a new folder")
    rows = [["file", "tags", "split", "mask"]]
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as part:
            for split, source in splits.items():
                for i, name in enumerate(source.names):
                    tags = [source.class_names[k + 1] for k in np.flatnonzero(source.image_labels[i])]
                    file, mask = f"{split}/{name}.png", f"masks/{split}/{name}.png" if split in masks else ""
                    for path, pixels in ((file, source.image(i)), (mask, source.mask(i) if mask else None)):
                        if pixels is not None:
                            (part / path).parent.mkdir(parents=True, exist_ok=True)
                            Image.fromarray(pixels).save(part / path)
                    rows.append([file, ";".join(tags), split, mask])
            names = next(iter(splits.values())).class_names
            (part / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            with open(part / "tags.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
    return folder / "tags.csv"
