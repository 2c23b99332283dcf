"""CVAT's format "Segmentation mask 1.1": label maps out, to be corrected, and back in.

    labelmap.txt                             a class a line, <name>:<red>,<green>,<blue>::
    ImageSets/Segmentation/default.txt       names of the images, without suffix
    SegmentationClass/<name>.png             colours of the classes
    SegmentationObject/<name>.png            a colour for each connected part, which becomes an object to be edited

An archive or its unpacked folder is read; its masks may also be grey, each value the number of a line.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from toco_core.conventions import voc_palette
from toco_core.data.files import MASK_SUFFIXES, decode_image, decode_mask, index_files, is_grey, picture_bytes
from toco_core.data.split import BACKGROUND_NAMES, inside_name, label_names
from toco_core.errors import ToCoError
from toco_core.machine.intake import limit, open_archive, open_file, read_bytes, refuse_above

MAP, LISTS, CLASSES, OBJECTS = "labelmap.txt", "ImageSets/Segmentation", "SegmentationClass", "SegmentationObject"
HEAD = "# label:color_rgb:parts:actions\n"
MOST_OBJECTS = 254  # colours of parts in one image; where there are more, a class is one object


# ---- out


def write_archive(
    file: io.BufferedIOBase, labels: Iterable[tuple[str, UInt8[np.ndarray, "H W"]]], class_names: Sequence[str]
) -> None:
    """Write (name, label map) pairs as an archive. Raises ToCoError for a class name that a label map cannot hold."""
    colours, names = voc_palette(), []
    lines = [HEAD]
    for k, name in {0: "background", **label_names(class_names)}.items():
        if ":" in name or name.startswith("#") or not name.isprintable():
            raise ToCoError(f"class {name!r:.60} cannot stand in {MAP}: no ':', no '#' at its beginning")
        lines.append(f"{name}:{','.join(map(str, colours[k].tolist()))}::\n")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, label in labels:
            names.append(name)
            archive.writestr(f"{CLASSES}/{name}.png", picture_bytes(colours[label]))
            archive.writestr(f"{OBJECTS}/{name}.png", picture_bytes(colours[objects_of(label)]))
        archive.writestr(MAP, "".join(lines))
        archive.writestr(f"{LISTS}/default.txt", "".join(f"{name}\n" for name in names))


def objects_of(label: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """A number from 1 for each connected part of a class, 0 for the background; for each class where there are many."""
    parts, n = np.zeros(label.shape, np.int32), 0
    for k in (k for k in np.unique(label).tolist() if k):
        found, own = cv2.connectedComponents((label == k).astype(np.uint8), connectivity=8)
        parts[own > 0] = own[own > 0] + n
        n += found - 1
    return (label if n > MOST_OBJECTS else parts).astype(np.uint8)


# ---- back in


def read_archive(
    path: Path | str, class_names: Sequence[str], sizes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, UInt8[np.ndarray, "H W"]]]:
    """(name, label map) of each mask of an export.

    `sizes`: the images by name, H and W. Raises ToCoError for what is no export, a class in use that is not among
    `class_names`, a colour of no class, a mask of another size than its image, and a name that is no image.
    """
    path = Path(path)
    with _folder(path) if path.is_dir() else _archive(path) as (files, read):
        if MAP not in files:
            raise ToCoError(f"{path} has no {MAP}: an export as 'Segmentation mask 1.1' is wanted")
        known = _labels(read(MAP), class_names, f"{path}: {MAP}")
        masks = sorted(f for f in files if f.startswith(f"{CLASSES}/") and f.lower().endswith(MASK_SUFFIXES))
        if not masks:
            raise ToCoError(f"{path} has no masks in {CLASSES}/: an export as 'Segmentation mask 1.1' is wanted")
        for file in masks:
            where = f"{path}: {file:.200}"
            name = inside_name(file.partition("/")[2].rpartition(".")[0], where, "the data set")
            name = name if name in sizes else name.removeprefix("JPEGImages/")
            if name not in sizes:
                raise ToCoError(f"{where} is the mask of {name!r:.100}, which is no image of the data set")
            yield name, _label(where, read(file), known, sizes[name])


class _Label(NamedTuple):
    """A line of the label map."""

    name: str
    colour: tuple[int, ...]  # red, green, blue; or none
    number: int | None  # of the class; None: the data set has no such class


def _labels(data: bytes, class_names: Sequence[str], where: str) -> list[_Label]:
    numbers = {name: k for k, name in label_names(class_names).items()}
    numbers |= dict.fromkeys(BACKGROUND_NAMES, 0)
    found = []
    try:
        for line in data.decode("utf-8-sig").splitlines():
            if line.strip() and not line.startswith("#"):
                name, colour = (part.strip() for part in line.split(":")[:2])
                values = tuple(int(n) for n in colour.split(",")) if colour else ()
                if values and (len(values) != 3 or min(values) < 0 or max(values) > 255):
                    raise ValueError(f"{colour!r:.60} is no colour")
                found.append(_Label(name, values, numbers.get(name)))
    except ValueError as error:
        raise ToCoError(f"{where} is no label map, <name>:<red>,<green>,<blue>:: ({error!s:.200})") from None
    return found


def _label(where: str, data: bytes, known: list[_Label], size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    if is_grey(where, data):
        codes, known_codes = decode_mask(where, data).astype(np.int64), dict(enumerate(known))
    else:
        codes = decode_image(where, data).astype(np.int64) @ (1 << 16, 1 << 8, 1)
        known_codes = {int.from_bytes(bytes(label.colour), "big"): label for label in known if label.colour}
        known_codes.setdefault(0, _Label("background", (0, 0, 0), 0))
    if codes.shape != size:
        raise ToCoError(f"{where} is {codes.shape[0]} x {codes.shape[1]}, its image is {size[0]} x {size[1]}")
    values, places = np.unique(codes, return_inverse=True)
    numbers = []
    for value in values.tolist():
        label = known_codes.get(value)
        if label is None:
            raise ToCoError(f"{where} holds a pixel of {value:06x} (colour or number), which no label of {MAP} has")
        if label.number is None:
            raise ToCoError(f"{where} shows the label {label.name!r:.60}, which is no class of the data set")
        numbers.append(label.number)
    return np.array(numbers, np.uint8)[places].reshape(size)


def files_of(folder: Path) -> dict[str, Path]:
    """The label map and the masks of an unpacked export, by name; nothing else in its folder is looked at."""
    files = index_files(folder / CLASSES, MASK_SUFFIXES)
    places = {f"{CLASSES}/{name}{place.suffix}": place for name, place in files.items()}
    return places | ({MAP: folder / MAP} if (folder / MAP).is_file() else {})


@contextlib.contextmanager
def _folder(path: Path):
    """The files of an unpacked export by name, and how one is read."""
    places = files_of(path)
    yield places, lambda name: read_bytes(places[name], "text_bytes" if name == MAP else "image_bytes")


@contextlib.contextmanager
def _archive(path: Path):
    """The same of an archive; nothing is unpacked to the disk, and no part of it may become larger than an image."""
    with open_file(path, "archive_bytes") as file:
        try:
            archive = open_archive(path, file)
        except zipfile.BadZipFile as error:
            raise ToCoError(f"{path} is no ZIP archive: {error}") from error
        entries = {entry.filename: entry for entry in archive.infolist() if not entry.filename.endswith("/")}

        def read(name: str) -> bytes:
            most = "text_bytes" if name == MAP else "image_bytes"
            refuse_above(most, entries[name].file_size, f"{path}: {name:.200}", "bytes")
            try:
                with archive.open(entries[name]) as part:
                    data = part.read(limit(most) + 1)
            except Exception as error:  # what damaged archives raise is of many types, and all of them mean the file
                raise ToCoError(f"{path}: {name:.200} cannot be unpacked: {error}") from error
            refuse_above(most, len(data), f"{path}: {name:.200}", "bytes or more")
            return data

        yield entries, read
