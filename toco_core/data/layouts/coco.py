"""MS COCO 2014, and any data set annotated in COCO's JSON.

    root/annotations/instances_<split>2014.json     images, annotations, categories (the year is not needed)
    root/<split>2014/<file_name>                    or images/<split>2014/, images/, JPEGImages/, the root itself
    root/<list>.txt                                 one image name a line: a split of its own (optional)

Category ids, which have gaps (1..90 in COCO), become 1..K in their order, and image-level labels are the categories of
an image's annotations. Masks are drawn when they are asked for: large objects first, so that what lies on them stays
visible; crowds count as their category. Polygons are drawn by `pycocotools`, as COCO's own evaluation does.
"""

import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from toco_core.conventions import IGNORE
from toco_core.data.files import IMAGE_SUFFIXES, image_size
from toco_core.data.split import (
    BACKGROUND_NAMES,
    Split,
    holdout,
    inside_name,
    listed_files,
    one_spelling,
    read_lines,
    refuse_twice,
    with_background,
    without_suffix,
)
from toco_core.errors import ToCoError
from toco_core.machine.intake import limit, read_bytes, read_json, refuse_above

LAYOUT = "a COCO folder holds annotations/instances_<split>.json and <split>/ or images/ with the images"
FEW_RUNS, LONG_RUN = 4096, 64  # few or long runs are painted one by one
MOST_CHARACTERS = 7  # of a run length in a compressed RLE: 35 bits
VAL_PART = "val_part"
VAL_PART_SHARE = 0.12  # of val: about 5000 of COCO's 40 thousand images


class COCOFolder(Split):
    """One split of a folder in COCO's layout, or of one annotation file. Opening it reads the JSON, no image.

    root: the folder, or a `.json` file; the images are then looked for beside the file and beside its folder.
    split: "train" is instances_train.json or instances_train2014.json; a file `<split>.txt` in the folder lists names
        from any of the annotation files; "val_part" without such a file is a fixed part of val (about 12 %, chosen by a
        hash of the name). For one file only "train", which is all of it.
    unlabelled: keep images that have no annotation (COCO 2014 has 702 of them in train, 367 in val). Off: they are left
        out, as published results do; `n_unlabelled` counts them.

    Image i has a mask if the file has any segmentation at all and no annotation of the image is without one: what has
    only a box would be background. Pixels listed under "ignore" of an image (RLE, no part of COCO; `export` writes
    them) are 255. Raises ToCoError, naming the file and the image or annotation.
    """

    label_source = "annotations"

    def __init__(self, root: Path | str, split: str = "train", *, unlabelled: bool = False):
        self.root, self.split = Path(root), split
        path, content, listed, wanted = _annotation_file(self.root, split)
        self.class_names, class_of = _classes(content["categories"], path)
        self.class_source = path.name
        images = _images(content["images"], path, wanted, listed)
        objects = _objects(content["annotations"], images, class_of, path, partial=listed is not None)
        self.n_unlabelled = sum(not objects[number] for number in images)
        if not unlabelled:
            images = {number: image for number, image in images.items() if objects[number]}
        if not images:
            raise ToCoError(f"split {split!r} is empty: {path} names no image{'' if unlabelled else ' with a label'}")
        if split == VAL_PART and listed is None:
            numbers = list(images)
            kept = holdout([images[n]["name"] for n in numbers], VAL_PART_SHARE)[1]
            images = {numbers[i]: images[numbers[i]] for i in kept}
        self.names = tuple(image["name"] for image in images.values())
        self._images = _find_images([image["file_name"] for image in images.values()], path, self.root)
        shapes = {number: [shape for _, shape in listed_objects] for number, listed_objects in objects.items()}
        drawn = not any(shapes.values()) or any(shape is not None for each in shapes.values() for shape in each)
        self._masks = [
            (image, objects[number]) if drawn and None not in shapes[number] else None
            for number, image in images.items()
        ]
        self._json = path
        self._image_labels = np.zeros((len(self.names), self.n_classes), np.uint8)
        for row, number in zip(self._image_labels, images, strict=True):
            row[[k - 1 for k, _ in objects[number]]] = 1

    def mask(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Class values of one item, drawn from its annotations; None where one of them has no segmentation."""
        if self._masks[index] is None:
            return None
        image, objects = self._masks[index]
        where, (H, W) = self._mask_name(index), image["size"]
        real = image_size(self._images[index])
        if sorted(real) != sorted((H, W)):  # sides may change places by EXIF; nothing is drawn for a size that is a lie
            raise ToCoError(
                f"{where} is {H} x {W} but its image {self._images[index].name} is {real[0]} x {real[1]}: "
                "a mask has the size of its image"
            )
        drawn = list(objects)
        if image["ignore"] is not None:
            drawn.append((IGNORE, image["ignore"]))
        length = sum(_outline(shape, H, W, where) for _, shape in drawn)
        refuse_above("outline_pixels", length, where, "pixels of outlines")
        runs = [(k, _runs(shape, H, W, where)) for k, shape in drawn]
        refuse_above("painted_pixels", sum(inside.area for _, inside in runs), where, "pixels of objects")
        mask = np.zeros((W, H), np.uint8)  # column by column, as RLE counts
        for k, inside in sorted(runs, key=lambda item: (item[0] == IGNORE, -item[1].area)):
            inside.paint(mask.reshape(-1), k)
        return mask.T.copy()

    def _mask_name(self, index: int) -> str:
        return f"{self._json} (image {self.names[index]})"


def split_names(root: Path | str) -> tuple[str, ...]:
    """The splits that a folder in COCO's layout, or one annotation file, has."""
    root = Path(root)
    if root.is_file():
        return ("train",)
    names = set(_annotation_files(root)) | {path.stem for path in _lists(root)}
    return tuple(sorted(names | ({VAL_PART} if "val" in names else set())))


def is_coco_json(path: Path) -> bool:
    """Whether a JSON file looks like COCO's, without parsing it."""
    data = read_bytes(path, "annotation_bytes")
    return all(f'"{key}"'.encode() in data for key in ("images", "annotations", "categories"))


def is_coco_folder(root: Path) -> bool:
    """Whether a folder has annotation files where COCO keeps them."""
    return bool(_annotation_files(root))


def _annotation_files(root: Path) -> dict[str, Path]:
    """Split -> file. The year is left out where only one is there."""
    files = sorted([*root.glob("annotations/instances_*.json"), *root.glob("instances_*.json")])
    found: dict[str, Path] = {}
    for path in files:
        full = path.stem.removeprefix("instances_")
        short = re.sub(r"_?20\d\d$", "", full) or full
        years = {p.stem.removeprefix("instances_") for p in files if p.stem.startswith(f"instances_{short}")}
        found[short if len(years) == 1 else full] = path
    return found


def _lists(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("*.txt")) if path.stem not in ("classes", "README", "readme", "license")]


def _annotation_file(root: Path, split: str) -> tuple[Path, dict, Path | None, set[str] | None]:
    """The JSON that holds a split, its content, the list that chooses from it, and the names that it chooses."""
    if root.is_file():
        if split != "train":
            raise ToCoError(f"split {split!r} is not in {root}: one annotation file is one split, 'train'")
        return root, _read_json(root), None, None
    files = _annotation_files(root)
    if not files:
        raise ToCoError(f"dataset folder {root} has no annotations/instances_*.json; {LAYOUT}")
    listed = next((path for path in _lists(root) if path.stem == split), None)
    if listed is not None:
        lines = _listed(listed)
        for path in files.values():
            content = _read_json(path)
            known = {without_suffix(Path(str(image.get("file_name", ""))).name) for image in content["images"]}
            names = {line if line in known else without_suffix(line) for line in lines}  # a name may end like a file's
            if names <= known:
                return path, content, listed, names
        raise ToCoError(f"{listed} names images that no one of {', '.join(p.name for p in files.values())} has")
    if split == VAL_PART and "val" in files:
        return files["val"], _read_json(files["val"]), None, None
    if split not in files:
        raise ToCoError(f"split {split!r} is not in {root}: there is {', '.join(split_names(root))}")
    return files[split], _read_json(files[split]), None, None


def _listed(path: Path) -> list[str]:
    lines = [line.split("/")[-1] for line in read_lines(path, "a list of names") if line]
    if not lines:
        raise ToCoError(f"{path} names no image")
    return lines


def _read_json(path: Path) -> dict[str, list]:
    content = read_json(path, "annotation_bytes")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ToCoError(f"{path} has no list {key!r}: COCO's JSON has images, annotations and categories")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise ToCoError(f"{path}: an entry of {key!r} is no object")
    return content


def _field(entry: dict, key: str, kind: type, where: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ToCoError(f"{where} has {key} = {value!r:.60}: {'a text' if kind is str else 'a whole number'} is wanted")
    return value


def _classes(categories: list[dict], path: Path) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names with background, and category id -> 1..K."""
    named = sorted(
        (_field(c, "id", int, f"{path}: a category"), _field(c, "name", str, f"{path}: category {c.get('id')!r:.40}"))
        for c in categories
    )
    refuse_twice((str(number) for number, _ in named), f"{path} has the category id")
    for number, name in named:  # none may go missing: the others' numbers would slip
        if not name.strip():
            raise ToCoError(f"{path}: category {number} has the name {name!r}: allowed is one with a letter")
    if named and named[0][1].strip().lower() in BACKGROUND_NAMES:
        raise ToCoError(f"{path} has a category {named[0][1]!r}: background is what no annotation covers")
    names = with_background([name for _, name in named], str(path))
    return names, {number: k for k, (number, _) in enumerate(named, start=1)}


def _images(entries: list[dict], path: Path, wanted: set[str] | None, listed: Path | None) -> dict[int, dict]:
    """Image id -> name, file name and size."""
    images: dict[int, dict] = {}
    for entry in entries:
        number = _field(entry, "id", int, f"{path}: an image")
        where = f"{path}: image {number}"
        file_name = inside_name(_field(entry, "file_name", str, where), where, "the image folder")
        if not file_name.lower().endswith(IMAGE_SUFFIXES):
            raise ToCoError(f"{where} has file_name = {file_name!r}: allowed are {', '.join(IMAGE_SUFFIXES)}")
        name = without_suffix(file_name)
        if wanted is not None and name.split("/")[-1] not in wanted:
            continue
        height, width = (_field(entry, side, int, where) for side in ("height", "width"))
        if min(height, width) < 1 or max(height, width) > limit("image_side") or height * width > limit("image_pixels"):
            raise ToCoError(
                f"{where} is {height} x {width}: allowed are 1 to {limit('image_pixels')} pixels, "
                f"at most {limit('image_side')} a side"
            )
        if number in images:
            raise ToCoError(f"{path} has the image id {number} more than once")
        ignore = entry.get("ignore") if isinstance(entry.get("ignore"), dict) else None
        images[number] = {"name": name, "file_name": file_name, "size": (height, width), "ignore": ignore}
    refuse_twice((image["name"] for image in images.values()), f"{path} names the image")
    if wanted is not None and len(images) != len(wanted):
        raise ToCoError(f"{listed} names {len(wanted)} images, {len(images)} of which are in {path.name}")
    return images


def _objects(
    entries: list[dict], images: dict[int, dict], class_of: dict[int, int], path: Path, *, partial: bool
) -> dict[int, list[tuple[int, Any]]]:
    """Image id -> (class, shape) of its annotations; a shape is compact and not checked yet, None without one.

    `partial`: `images` are only some of those that the annotations belong to.
    """
    objects: dict[int, list[tuple[int, Any]]] = {number: [] for number in images}
    for entry in entries:
        number, where = entry.get("image_id"), f"{path}: annotation {entry.get('id')!r:.40}"
        if type(number) is not int or number not in objects:
            if partial:
                continue
            raise ToCoError(f"{where} has image_id = {number!r:.60}, which no image has")
        category = entry.get("category_id")
        if type(category) is not int or category not in class_of:
            raise ToCoError(f"{where} has category_id = {category!r:.60}, which no category has")
        shape = _compact(entry["segmentation"], where) if entry.get("segmentation") else None
        objects[number].append((class_of[category], shape))
    return objects


def _compact(shape: Any, where: str) -> Any:
    """Polygons as arrays of doubles (a tenth of the memory of Python's lists); RLE as it is."""
    if isinstance(shape, dict):
        return shape
    try:
        return [array("d", polygon) for polygon in shape]
    except (TypeError, OverflowError):
        raise ToCoError(f"{where}: a segmentation is a list of polygons or an RLE, not {shape!r:.60}") from None


class _Runs(NamedTuple):
    """An object as runs of pixels, counted column by column."""

    begins: Int64[np.ndarray, " R"]
    ends: Int64[np.ndarray, " R"]
    area: int

    def paint(self, pixels: UInt8[np.ndarray, " HW"], value: int) -> None:
        """Set the pixels of the object."""
        whole = int(self.ends[-1] - self.begins[0]) if len(self.begins) else 0
        if len(self.begins) <= max(FEW_RUNS, whole // LONG_RUN):
            for begin, end in zip(self.begins.tolist(), self.ends.tolist(), strict=True):
                pixels[begin:end] = value
            return
        steps = np.zeros(whole + 1, np.int8)  # many short runs: all at once
        np.add.at(steps, self.begins - self.begins[0], 1)
        np.add.at(steps, self.ends - self.begins[0], -1)
        inside = np.cumsum(steps[:-1], dtype=np.int8).astype(bool)
        pixels[self.begins[0] : self.ends[-1]][inside] = value


def _runs(shape: Any, H: int, W: int, where: str) -> _Runs:
    """The pixels inside polygons or RLE."""
    if isinstance(shape, dict):
        counts = _given_counts(shape, H, W, where)
    else:
        polygons = [polygon.tolist() for polygon in shape]
        from pycocotools import mask as rle  # here, as training on other layouts needs no such library

        counts = _counts(rle.merge(rle.frPyObjects(polygons, H, W))["counts"])
    edges = np.cumsum(counts)
    begins, ends = edges[: len(edges) // 2 * 2 : 2], edges[1::2]
    longer = ends > begins  # a run may be empty
    return _Runs(begins[longer], ends[longer], int((ends - begins).sum()))


def _outline(shape: Any, H: int, W: int, where: str) -> int:
    """How long the outline of an object is, at most: pixels of polygons, counts of an RLE."""
    if not isinstance(shape, dict):
        return sum(_length(polygon, H, W, where) for polygon in shape)
    counts = shape.get("counts")
    return len(counts) if isinstance(counts, (str, list)) else 0


def _length(polygon: array, H: int, W: int, where: str) -> int:
    """Pixels that the outline of a polygon passes, at most; `pycocotools` takes memory for five times as many."""
    if len(polygon) < 6 or len(polygon) % 2:
        raise ToCoError(f"{where}: a polygon of {len(polygon)} numbers: 6 or more, in pairs, are wanted")
    points = np.frombuffer(polygon).reshape(-1, 2)
    if not np.isfinite(points).all() or points.max() > 2 * max(H, W) or points.min() < -max(H, W):
        raise ToCoError(f"{where}: a polygon leads far out of its image of {H} x {W}")
    return int(np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()) + len(points)


def _given_counts(shape: dict, H: int, W: int, where: str) -> Int64[np.ndarray, " R"]:
    """Run lengths of an RLE, compressed (text) or not (list of counts). `pycocotools` would not notice a short one."""
    if shape.get("size") != [H, W]:
        raise ToCoError(f"{where}: an RLE of size {shape.get('size')!r:.60} in an image of {H} x {W}")
    counts = shape.get("counts")
    if isinstance(counts, str):
        try:
            counts = _counts(counts.encode("ascii"))
        except ValueError:
            counts = None
    elif isinstance(counts, list) and all(type(n) is int and 0 <= n <= H * W for n in counts):
        counts = np.array(counts, np.int64)
    else:
        counts = None
    if counts is None or counts.min(initial=0) < 0 or counts.sum() != H * W:
        raise ToCoError(f"{where}: the counts of an RLE do not add up to {H} x {W}")
    return counts


def rle_mask(shape: Mapping, where: str = "a mask") -> Bool[np.ndarray, "H W"]:
    """The pixels of an RLE, packed or not, of the size that it says. Raises ToCoError for one that is none."""
    size, counts = shape.get("size"), shape.get("counts")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ToCoError(f"{where}: an RLE of size {size!r:.60}: rows and columns are wanted")
    refuse_above("image_pixels", size[0] * size[1], where, "pixels")
    counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    runs = _given_counts({"size": list(size), "counts": counts}, *size, where)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[1], size[0]).T


def _counts(text: bytes) -> Int64[np.ndarray, " R"]:
    """Run lengths of a compressed RLE: 5 bits a character, low ones first, 32 says that more follow, the sign is in the
    last one's 16; from the fourth on each is the difference to the one before the last. Raises ValueError."""
    bits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(bits):
        return bits
    last = bits & 32 == 0
    if bits.min() < 0 or bits.max() > 63 or not last[-1]:
        raise ValueError("it is no RLE")
    begins = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(bits)) - np.repeat(begins, np.diff(begins, append=len(bits)))
    if place.max() > MOST_CHARACTERS - 1:
        raise ValueError("a count has too many characters")
    values = np.add.reduceat((bits & 31) << (5 * place), begins)
    values -= np.where(bits[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


def image_folders(path: Path) -> tuple[str, ...]:
    """The usual folders of the images that an annotation file names, the first one that has them counts."""
    full = path.stem.removeprefix("instances_")
    short = re.sub(r"_?20\d\d$", "", full)
    return tuple(dict.fromkeys([full, f"images/{full}", short, f"images/{short}", "images", "JPEGImages", "."]))


def _find_images(file_names: Sequence[str], path: Path, root: Path) -> list[Path]:
    """The files, in whichever of the usual folders holds the first of them."""
    bases = [root] if root.is_dir() else [path.parent, path.parent.parent]
    below = image_folders(path)
    folders = [base / name for base in bases for name in below]
    folder = next((f for f in folders if (f / file_names[0]).is_file()), None)
    if folder is None:
        tried = ", ".join(below[:-1])
        raise ToCoError(f"{file_names[0]}, named in {path.name}, is in none of the folders {tried} of {bases[0]}")
    there = {one_spelling(p.relative_to(folder).as_posix()): p for p in folder.rglob("*") if p.suffix}
    return listed_files(there, file_names, folder, path.name)
