"""Read one image or one mask from disk, or say by name what is wrong with the file.

Pixels leave as `uint8`: images `H W 3` in RGB, masks `H W` with class values (0 background, 1..K, 255 = ignore).
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from tqdm import tqdm

from toco_core.conventions import voc_palette
from toco_core.errors import BrokenFile, ToCoError
from toco_core.machine.intake import limit, open_file, read_bytes, refuse_above

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")  # the first one wins where a name has several files
MASK_SUFFIXES = (".png", ".bmp")
UNREAD_SUFFIXES = tuple(".heic .heif .webp .tif .tiff .gif .avif .jp2 .dng .cr2 .nef .arw".split())  # of other pictures
HIDDEN_FOLDERS = (".", "__", "@")  # how those begin that programs keep for themselves: .thumbnails, __MACOSX, @eaDir
IMAGE_FORMATS = ("JPEG", "PNG", "BMP")
ORIENTATION = 0x0112  # EXIF: how the picture is to be turned; 1 is not at all
READERS = {b"\xff\xd8\xff": JpegImageFile, b"\x89PNG\r\n\x1a\n": PngImageFile, b"BM": BmpImageFile}  # by first bytes
MOST_CHUNKS = 1_000_000  # of a PNG; writers cut one in 8 KB and more
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG's segment; FF 00 and restarts belong to a scan
PROGRESS_FROM = 500  # files; shorter jobs show no bar


def read_image(path: Path | str) -> UInt8[np.ndarray, "H W 3"]:
    """Decode a JPEG, PNG or BMP file to RGB, whatever it holds.

    Grey is repeated, alpha is dropped, 16-bit keeps its upper byte, CMYK is converted, and the EXIF rotation is
    applied. Raises ToCoError, naming the file, where it is missing, truncated, not an image, or beyond a limit (see
    `machine.intake`) of bytes, pixels or scans.
    """
    return decode_image(path, _read_bytes(path))


def decode_image(path: Path | str, data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The same of bytes that were read; `path` names them in messages."""
    _open(path, data, IMAGE_FORMATS)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, MemoryError) as error:
        raise ToCoError(f"{path} cannot be decoded: {getattr(error, 'err', '') or error}") from error
    if image is None:
        raise ToCoError(f"{path} is damaged: its pixels cannot be decoded")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_mask(path: Path | str) -> UInt8[np.ndarray, "H W"]:
    """The values of a palette or grey PNG (or BMP), unchanged: palette indices, not palette colours.

    Raises ToCoError, naming the file, as `read_image`, and where the file holds colours or values above 255.
    """
    return decode_mask(path, _read_bytes(path))


def is_grey(path: Path | str, data: bytes) -> bool:
    """Whether a PNG or BMP holds one number a pixel and no palette."""
    return _open(path, data, ("PNG", "BMP")).mode in ("1", "L", "I", "I;16", "I;16B", "LA")


def decode_mask(path: Path | str, data: bytes) -> UInt8[np.ndarray, "H W"]:
    """The same of bytes that were read; `path` names them in messages."""
    image = _open(path, data, ("PNG", "BMP"))
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "LA", "PA"):
        raise ToCoError(f"{path} is a colour image ({image.mode}): a mask is a palette or grey PNG of class values")
    try:
        values = np.asarray(image.getchannel(0) if image.mode in ("LA", "PA") else image)
    except Exception as error:  # the decoder's errors are of many types, and all of them mean the file
        raise ToCoError(f"{path} is damaged: {error}") from error
    if image.mode == "L" and image.format == "PNG":
        values = values // (255 // (2 ** min(_png_depth(data), 8) - 1))  # PIL stretches few bits to 0..255
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise ToCoError(f"{path} holds the value {values.max()}: mask values are 0..255")
    return np.array(values, dtype=np.uint8)


def picture_bytes(pixels: np.ndarray, suffix: str = ".png", *options: int) -> bytes:
    """Pixels (uint8, RGB or one channel) as the bytes of a PNG or JPEG file; `options` of OpenCV."""
    bgr = np.ascontiguousarray(pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return cv2.imencode(suffix, bgr, options)[1].tobytes()


def palette_png(label: UInt8[np.ndarray, "H W"]) -> bytes:
    """A label map as a palette PNG with VOC's colours, whose indices are the labels."""
    image = Image.fromarray(label, "L").convert("P")
    image.frombytes(np.ascontiguousarray(label).tobytes())
    image.putpalette(voc_palette().tobytes())
    with BytesIO() as file:
        image.save(file, "PNG", optimize=False)
        return file.getvalue()


def index_files(folder: Path, suffixes: tuple[str, ...], *, hidden: bool = True) -> dict[str, Path]:
    """Name -> file, for the files that `named_files` gives: of several with one name the first."""
    found: dict[str, Path] = {}
    for name, path in named_files(folder, suffixes, hidden=hidden):
        found.setdefault(name, path)
    return found


def named_files(folder: Path, suffixes: tuple[str, ...], *, hidden: bool = True) -> list[tuple[str, Path]]:
    """(Name, file) of the files in `folder` with one of `suffixes`, in the order of these, then sorted.

    A name is the path below `folder` without suffix, with `/`. `hidden` off: without files that begin with a dot, and
    without folders that begin as `HIDDEN_FOLDERS`. A folder that is not there holds none. Raises ToCoError for one that
    cannot be read, and where there are too many files: a link may have led to the root of the system.
    """

    def unreadable(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise ToCoError(f"{error.filename} cannot be read: {error.strerror or error}") from error

    found: list[tuple[int, str, Path]] = []
    seen = 0
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        seen += len(folders) + len(files)
        refuse_above("folder_entries", seen, folder, "files and folders or more")
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(HIDDEN_FOLDERS)]
        below = Path(parent).relative_to(folder)
        for file in files:
            suffix = Path(file).suffix.lower()
            if suffix in suffixes and (hidden or not file.startswith(".")):
                name = (below / file).with_suffix("").as_posix()
                found.append((suffixes.index(suffix), name, Path(parent, file)))
    return [(name, path) for _, name, path in sorted(found)]


def unused_images(folder: Path) -> dict[Path, str]:
    """Picture -> why no reader of `folder` takes it, for those that it passes over. Hidden ones are not looked at."""
    found: dict[str, Path] = {}
    reasons = {}
    for name, path in named_files(folder, (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES), hidden=False):
        reason = why_unused(path, found.get(name))
        if reason:
            reasons[path] = reason
        else:
            found[name] = path
    return reasons


def why_unused(path: Path, first: Path | None) -> str:
    """Why a picture is not used, as far as its name tells; `first` is the one of that name that counts."""
    suffix = path.suffix.lower()
    if suffix in UNREAD_SUFFIXES:
        return f"{suffix} is not read: {', '.join(IMAGE_SUFFIXES)} are"
    return "" if first is None else f"{first.name} has the same name"


def map_files(function: Callable[[Any], Any], items: Iterable, *, what: str, progress: bool = True) -> list:
    """`[function(item) for item in items]` on several threads, in order; a progress bar for more than `PROGRESS_FROM`.

    All items are visited even if some fail. Raises one BrokenFile: the first failure, and how many more there are.
    """
    return raise_first(attempt_files(function, items, what=what, progress=progress))


def attempt_files(
    function: Callable[[Any], Any], items: Iterable, *, what: str, progress: bool = True
) -> list[tuple[Any, ToCoError | None]]:
    """As `map_files`, but per item what came out and None, or None and the ToCoError."""

    def attempt(item):
        try:
            return function(item), None
        except ToCoError as error:
            return None, error

    items = list(items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(attempt, items)
        quiet = not progress or len(items) <= PROGRESS_FROM
        return list(tqdm(done, desc=what, total=len(items), unit="file", disable=quiet, file=sys.stdout))


def raise_first(outcomes: list[tuple[Any, ToCoError | None]]) -> list:
    """What came out of each item; or one BrokenFile, the first, and how many more there are."""
    errors = [error for _, error in outcomes if error is not None]
    if errors:
        more = f" ({len(errors) - 1} more of {len(outcomes)} files have problems)" if len(errors) > 1 else ""
        raise BrokenFile(f"{errors[0]}{more}") from errors[0]
    return [value for value, _ in outcomes]


def image_size(path: Path | str) -> tuple[int, int]:
    """H, W as the header of an image says, before any EXIF rotation; nothing is decoded. Raises ToCoError."""
    with open_file(path, "image_bytes") as file:
        image = _header(path, file, IMAGE_FORMATS)
        return image.height, image.width


def is_upright(path: Path | str) -> bool:
    """Whether an image is stored as it is to be seen: its EXIF does not say how to turn it. Raises ToCoError."""
    with open_file(path, "image_bytes") as file:
        return _header(path, file, IMAGE_FORMATS).getexif().get(ORIENTATION, 1) == 1


def _read_bytes(path: Path | str) -> bytes:
    data = read_bytes(path, "image_bytes")
    if not data:
        raise ToCoError(f"{path} is empty (0 bytes)")
    return data


def _open(path: Path | str, data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """The header, checked, pixels not decoded yet; and the file is whole, which not every decoder minds."""
    image = _header(path, BytesIO(data), formats)
    pixels = image.width * image.height
    if pixels > limit("image_pixels"):
        refuse_above("image_pixels", pixels, f"{path} is {image.height} x {image.width} and", "pixels")
    whole = {"JPEG": _jpeg_is_whole, "PNG": _png_is_whole}.get(image.format)
    if whole is not None and not whole(data):
        raise ToCoError(f"{path} is truncated: the end of the {image.format} file is missing ({len(data)} bytes)")
    if image.format == "JPEG":
        scans = _jpeg_scans(data)
        refuse_above("jpeg_scans", scans, path, "scans")
        refuse_above("scanned_pixels", scans * pixels, path, "pixels in all its scans together")
    return image


def _header(path: Path | str, file: BufferedIOBase, formats: tuple[str, ...]) -> Image.Image:
    """What PIL makes of a header, without its own limits of pixels, which would warn, or refuse below ours."""
    try:
        start = file.read(8)
        file.seek(0)
    except OSError as error:
        raise ToCoError(f"{path} cannot be read: {error.strerror or error}") from error
    for mark, kind in READERS.items():
        if start.startswith(mark) and kind.format in formats:
            try:
                return kind(file)
            except Exception as error:  # the plugins' errors are of many types, and all of them mean the file
                raise ToCoError(f"{path} is not a readable {kind.format} file: {error}") from error
    raise ToCoError(f"{path} is not a readable {' or '.join(formats)} file")


def _png_depth(data: bytes) -> int:
    """Bits of a channel, from the header chunk, which need not be the first one."""
    header = next((at for kind, at in _png_chunks(data) if kind == b"IHDR" and at + 17 <= len(data)), None)
    return 8 if header is None else max(data[header + 16], 1)


def _png_is_whole(data: bytes) -> bool:
    """Chunk after chunk leads to the last one. OpenCV takes the memory that a chunk declares before it looks for it."""
    return any(kind == b"IEND" for kind, _ in _png_chunks(data))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Kind and place of each chunk, in order, as long as the file has them."""
    position = 8
    for _ in range(MOST_CHUNKS):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if len(kind) < 4:
            return
        yield kind, position
        position += size + 12


def _jpeg_is_whole(data: bytes) -> bool:
    """An end-of-image marker follows the first scan. (A thumbnail in the header may have one of its own.)"""
    first = _first_scan(data)
    return first is not None and data.find(b"\xff\xd9", first) >= 0


def _first_scan(data: bytes) -> int | None:
    """Where the first scan begins."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker == 0xDA:  # start of scan: from here FF is stuffed, so FF D9 can only be the end
            return position
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _jpeg_scans(data: bytes) -> int:
    """How many scans come before the end-of-image marker: a progressive file shows the image again with each."""
    position, scans = _first_scan(data), 0
    while position is not None and position + 4 <= len(data) and data[position + 1] != 0xD9:
        scans += data[position + 1] == 0xDA
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        marker = MARKER.search(data, position)
        position = marker.start() if marker else None
    return scans
