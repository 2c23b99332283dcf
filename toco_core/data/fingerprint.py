"""What data a result belongs to, in a few digests: so that a result of other data is not taken for this one's.

A run, a kept evaluation and an export write down the fingerprint of their splits and compare it when they are asked
again. It counts names, classes, image-level labels, and the files of images and masks.

A file is read only where its size or a time of it is not the one written down; then its length and both its ends
(`END` bytes each; the whole of an uncompressed file) decide, so that a copy of the data counts as the same data. Data
that this package draws itself differ in their last bits from machine to machine: there the drawing's version and
numbers stand for its files and for the labels that follow from them.
"""

import hashlib
import json
import os
import stat
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from toco_core.data import TrainVal
from toco_core.data.scenes import drawing_of

END = 2**15
UNCOMPRESSED = (".bmp", ".tif", ".tiff", ".npy", ".mat")
WORDS = {
    "classes": "other classes",
    "names": "other images or another order",
    "labels": "other image-level labels",
    "images": "other contents of image files",
    "masks": "other masks",
    "drawing": "another drawing of the embedded data set",
}


def data_fingerprint(data: TrainVal, known: Any = None) -> dict[str, dict]:
    """The fingerprints of both splits; `known` as for `split_fingerprint`, of both."""
    known = known if isinstance(known, dict) else {}
    parts = {"train": data.train, "val": data.val}
    return {part: split_fingerprint(split, known.get(part)) for part, split in parts.items()}


def split_fingerprint(split, known: Any = None) -> dict:
    """The fingerprint of a split, as JSON holds it: `n` and a digest for each key of `WORDS` that applies.

    known: one that was written down before; of files that have not been touched since, its digests are taken over.
    """
    known = known if isinstance(known, dict) else {}
    found: dict[str, Any] = {"n": len(split), "names": _of_texts(split.names)}
    found["classes"] = _of_texts(getattr(split, "class_names", ()))
    found |= _files(split, known)
    found["labels_from"] = source = getattr(split, "label_source", None)
    same_masks = all(found.get(key) == known.get(key) for key in ("names", "classes", "masks", "labels_from"))
    if source == "masks" and same_masks and "masks" in found and "labels" in known:
        found["labels"] = known["labels"]  # they follow from the masks, all of which would have to be read
    elif not ("drawing" in found and source == "masks"):
        found["labels"] = _of_bytes(np.ascontiguousarray(split.image_labels, dtype=np.uint8).tobytes())
    return found


def differences(known: Any, found: dict) -> list[str]:
    """In words, what differs between the fingerprint of one split that was written down and today's; [] for nothing.

    What one of the two does not have (it is of another version, or of data without files) is not compared.
    """
    if not isinstance(known, dict):
        return []
    if known.get("n") != found["n"]:
        return [f"{found['n']} images, not {known.get('n')!r:.20}"]
    return [words for key, words in WORDS.items() if key in known and key in found and known[key] != found[key]]


def data_differences(known: dict, found: dict[str, dict]) -> dict[str, bool]:
    """The same of both splits, and for each difference whether training depends on it: not on masks of val, nor on
    those of train where the image-level labels do not come from them."""

    def counts(part: str, words: str) -> bool:
        return words != WORDS["masks"] or (part == "train" and found[part]["labels_from"] == "masks")

    return {f"{part} has {d}": counts(part, d) for part in found for d in differences(known.get(part), found[part])}


def file_digests(split, *, masks: bool = True) -> dict[str, str]:
    """What the files of a split hold, for settings of which a kept result is made: `image_files` and `mask_files`, or
    `drawing`; equal for a copy of the data."""
    found = _files(split, {}, masks=masks)
    names = {"images": "image_files", "masks": "mask_files", "drawing": "drawing"}
    return {name: found[key] for key, name in names.items() if key in found}


def _files(split, known: dict, *, masks: bool = True) -> dict[str, str]:
    """The digests of what the files of a split hold; nothing for a split that is no `data.Split`."""
    drawing = drawing_of(getattr(split, "root", None))
    if drawing or not hasattr(split, "mask_source"):
        return {"drawing": drawing} if drawing else {}
    found = _of_files("images", [split.image_path(i) for i in range(len(split))], known)
    if masks:
        found |= _of_files("masks", [split.mask_source(i) for i in range(len(split))], known)
    return found


def _of_files(what: str, sources: Sequence[Any], known: dict) -> dict[str, str]:
    """The digest of what files hold, and that of their sizes and times, under `what` and `what`_as_of; of records that
    of their contents, under both."""
    states = [_state(source) for source in sources]
    as_of = _of_texts(json.dumps(state) for state in states)
    if known.get(f"{what}_as_of") == as_of and isinstance(known.get(what), str):
        return {what: known[what], f"{what}_as_of": as_of}
    with ThreadPoolExecutor(8) as pool:
        contents = b"".join(pool.map(_content, sources, states))
    return {what: _of_bytes(contents), f"{what}_as_of": as_of}


def _state(source: Any) -> Any:
    """Size, times and number of a file; of a record its content, which is written quicker than `_content` does."""
    if not isinstance(source, Path):
        return _of_texts([json.dumps(source, default=_in_bytes)])
    try:
        found = os.stat(source)
    except OSError:
        return "missing"
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, stat.S_IFMT(found.st_mode)]


def _content(source: Any, state: Any) -> bytes:
    """Digest of a file's length and ends, or of a record, whose text is that of all versions of this package."""
    if not isinstance(source, Path):
        state = _of_texts([json.dumps(source, default=_plain)])
    if not isinstance(state, list) or state[-1] != stat.S_IFREG:
        return hashlib.sha256(json.dumps(state).encode()).digest()
    digest = hashlib.sha256(str(state[0]).encode())
    try:
        with open(source, "rb") as file:
            if source.suffix.lower() in UNCOMPRESSED or state[0] <= 2 * END:
                while block := file.read(2**20):
                    digest.update(block)
            else:
                digest.update(file.read(END))
                file.seek(-END, os.SEEK_END)
                digest.update(file.read(END))
    except OSError:  # whoever needs the file says so
        digest.update(b"unreadable")
    return digest.digest()


def _in_bytes(value: Any) -> Any:
    """As `_plain`; the corners of polygons without turning each number into digits, which takes three times as long."""
    return value.tobytes().hex() if isinstance(value, array) else _plain(value)


def _plain(value: Any) -> Any:
    """What JSON does not know of a record that a mask is drawn from."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.hex() if isinstance(value, bytes) else str(value)


def _of_texts(texts: Iterable[str]) -> str:
    return _of_bytes(json.dumps(list(texts)).encode())


def _of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
