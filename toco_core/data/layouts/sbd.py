"""Masks of SBD (Semantic Boundaries Dataset, Hariharan et al., ICCV 2011): MATLAB files beside a VOC folder.

    benchmark_RELEASE/dataset/cls/<name>.mat        struct GTcls, whose field Segmentation holds 0..20

SBD labels 11,355 images of VOC 2012, most of which VOC itself gives no mask. What its archive unpacks to is found in
the VOC folder, beside it, or beside the VOCdevkit that holds it; a folder named SBD with `cls/` in it does as well.

Only what such a file needs of MATLAB's level 5 format is read: one struct of plain arrays, field by field without any
nesting, all but one skipped. Nothing that a file holds is run, and a file from a stranger can neither take more memory
than the limit `mat_bytes` nor go so deep that the process dies, as general readers do.
"""

import itertools
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from toco_core.errors import ToCoError
from toco_core.machine.intake import limit, read_bytes

FOLDERS = ("benchmark_RELEASE/dataset", "SBD")
MAX_FIELDS = 64
HEADER = 128  # bytes: text, then version and byte order
MATRIX, COMPRESSED = 14, 15  # kinds of element
STRUCT, NUMERIC = 2, range(6, 16)  # kinds of matrix
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def sbd_folder(root: Path) -> Path | None:
    """The folder `cls` of SBD in a VOC folder, beside it or beside its parent; None where there is none, or where its
    images are not this folder's (as those of VOC 2007)."""
    for base in (root, *root.resolve().parents[:2]):
        for name in FOLDERS:
            masks = base / name / "cls"
            some = itertools.islice(masks.glob("*.mat"), 100)
            if any((root / "JPEGImages" / f"{path.stem}.jpg").is_file() for path in some):
                return masks
    return None


def read_sbd_mask(path: Path | str) -> UInt8[np.ndarray, "H W"]:
    """GTcls.Segmentation of one file: 0 background, 1..20. Raises ToCoError, naming the file."""
    data = read_bytes(path, "mat_bytes")
    try:
        mask = _segmentation(data)
    except (ValueError, struct.error, zlib.error) as error:
        raise ToCoError(f"{path} is no MATLAB file of SBD with GTcls.Segmentation: {error}") from error
    if mask.size == 0 or not np.isin(mask, range(256)).all():
        raise ToCoError(f"{path} holds a mask of shape {mask.shape} with values beyond 0..255")
    return mask.astype(np.uint8)


def _segmentation(data: bytes) -> np.ndarray:
    order = {b"IM": "<", b"MI": ">"}.get(data[HEADER - 2 : HEADER])
    if order is None:
        raise ValueError("it does not begin as MATLAB's level 5 format")
    for kind, content in _elements(data[HEADER:], order):
        if kind == COMPRESSED:
            kind, content = next(_elements(_unpacked(content), order), (0, b""))
        if kind == MATRIX:
            name, fields = _struct(content, order)
            if name == b"GTcls" and b"Segmentation" in fields:
                return _numbers(fields[b"Segmentation"], order)
    raise ValueError("there is no such entry")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the elements that follow each other; short ones lie in their own tag."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:  # short: size and kind share a word
            kind, size, begin = kind & 0xFFFF, kind >> 16, at + 4
            at += 8
            if size > 4:
                raise ValueError(f"a short element of {size} bytes")
        else:
            begin = at + 8
            at = begin + size + (0 if kind == COMPRESSED else -size % 8)
        if begin + size > len(data):
            raise ValueError("it is truncated")
        yield kind, data[begin : begin + size]


def _unpacked(content: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(content, limit("mat_bytes"))
    if not unpacker.eof:
        raise ValueError(f"its packed part is damaged, or larger than {limit('mat_bytes')} bytes")
    return unpacked


def _struct(matrix: bytes, order: str) -> tuple[bytes, dict[bytes, bytes]]:
    """Name of a variable and, of a single struct, field -> matrix; no fields for anything else."""
    parts = _elements(matrix, order)
    (_, flags), _, (_, name) = (next(parts, (0, b"")) for _ in range(3))
    if struct.unpack_from(f"{order}I", flags)[0] & 0xFF != STRUCT:
        return name, {}
    (_, width), (_, names) = (next(parts, (0, b"")) for _ in range(2))
    (width,) = struct.unpack(f"{order}i", width)
    if width < 1 or len(names) > MAX_FIELDS * width:
        raise ValueError(f"names of fields in {len(names)} bytes, {width} each")
    fields = [names[i : i + width].split(b"\0")[0] for i in range(0, len(names), width)]
    return name, dict(zip(fields, (content for kind, content in parts if kind == MATRIX), strict=False))


def _numbers(matrix: bytes, order: str) -> np.ndarray:
    """A plain matrix of two axes; MATLAB stores it column by column, as the smallest type that holds its values."""
    parts = _elements(matrix, order)
    (_, flags), (_, shape), _, (kind, values) = (next(parts, (0, b"")) for _ in range(4))
    if struct.unpack_from(f"{order}I", flags)[0] & 0xFF not in NUMERIC or kind not in NUMBERS or len(shape) != 8:
        raise ValueError("Segmentation is no matrix of numbers")
    H, W = struct.unpack(f"{order}ii", shape)
    numbers = np.frombuffer(values, np.dtype(order + NUMBERS[kind]))
    if min(H, W) < 0 or math.prod((H, W)) != numbers.size:
        raise ValueError(f"{numbers.size} numbers for a matrix of {H} x {W}")
    return numbers.reshape(H, W, order="F")
