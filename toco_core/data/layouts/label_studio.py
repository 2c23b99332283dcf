"""Label Studio's tasks with brush labels: label maps out, to be corrected, and back in.

    tasks.json      a list of tasks; each image, its name, and its label map as a prediction to begin with
    config.xml      the labels, as a project's "Labeling Interface" takes them

What Label Studio exports as "JSON" is read: of each task the newest annotation that was not cancelled, region upon
region. The regions of other tools than the brush are refused, as they would be lost.

A brush region is packed in bits: 32 for the number of values, 5 for the length of one (less 1), four times 4 for the
lengths of counts (less 1); then blocks of 1 bit (repeated or not), 2 bits (which length of count), a count (less 1),
and one value or as many. The values are those of an image of four channels, all the same; the last one counts.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import Bool, UInt8

from toco_core.conventions import voc_palette
from toco_core.data.split import inside_name, label_names, without_suffix
from toco_core.errors import ToCoError
from toco_core.machine.intake import read_json, refuse_above

COUNTS = (3, 4, 8, 16)  # lengths of counts in bits, as Label Studio itself writes them
CHANNELS = 4
UPLOADED = re.compile(r"[0-9a-f]{8}-")  # before the name of a file that was uploaded
AWAY = "only brush labels are read back: turn the region into a brush, or delete it"


# ---- out


def config_xml(class_names: Sequence[str]) -> str:
    """The labelling interface of a project: a brush for each class, and one for what is not to be learned from."""
    colours = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in voc_palette().tolist()]
    rows = [(name, colours[k]) for k, name in label_names(class_names).items()]
    labels = "\n".join(f"    <Label value={quoteattr(name)} background={quoteattr(colour)}/>" for name, colour in rows)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="label" toName="image">\n{labels}\n  </BrushLabels>\n</View>\n'
    )


def tasks_json(
    labels: Iterable[tuple[str, str, UInt8[np.ndarray, "H W"]]], class_names: Sequence[str], *, model: str
) -> str:
    """Tasks of (name, address of the image, label map); each label map is a prediction of `model`."""
    named = label_names(class_names)
    tasks = []
    for name, image, label in labels:
        regions = [
            {
                "id": f"region-{k}",
                "type": "brushlabels",
                "from_name": "label",
                "to_name": "image",
                "original_height": label.shape[0],
                "original_width": label.shape[1],
                "image_rotation": 0,
                "value": {"format": "rle", "rle": packed(label == k), "brushlabels": [named[k]]},
            }
            for k in np.unique(label).tolist()
            if k
        ]
        prediction = {"model_version": model, "result": regions}
        tasks.append({"data": {"image": image, "name": name}, "predictions": [prediction]})
    return json.dumps(tasks)


def packed(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """A mask as the bytes of a brush region."""
    values = mask.ravel().astype(np.uint8)
    edges = np.flatnonzero(np.diff(values)) + 1
    lengths = CHANNELS * np.diff([0, *edges.tolist(), values.size])
    bits = [f"{CHANNELS * values.size:032b}", f"{8 - 1:05b}", *(f"{n - 1:04b}" for n in COUNTS)]
    for length, value in zip(lengths.tolist(), (255 * values[[0, *edges.tolist()]]).tolist(), strict=True):
        while length:
            part = min(length, 2 ** COUNTS[-1])
            which = next(i for i, n in enumerate(COUNTS) if part <= 2**n)
            bits.append(f"1{which:02b}{part - 1:0{COUNTS[which]}b}{value:08b}")
            length -= part
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


# ---- back in


def read_tasks(
    path: Path | str, class_names: Sequence[str], sizes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, UInt8[np.ndarray, "H W"]]]:
    """(name, label map) of each annotated task of an export; tasks without an annotation are passed over.

    `sizes`: the images by name, H and W. Later regions lie on earlier ones; what no region covers is background.
    Raises ToCoError for what is no export, a label that is no class, another size than the image's, a name that is no
    image, one that comes twice, and regions that are no brush.
    """
    tasks = read_json(path, "annotation_bytes")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ToCoError(f"{path} is no export of Label Studio: a list of tasks is wanted, as its format JSON gives it")
    numbers = {name: k for k, name in label_names(class_names).items()}
    seen: set[str] = set()
    for place, task in enumerate(tasks, start=1):
        where = f"{path}: task {place}"
        annotation = _newest(task.get("annotations"), where)
        if annotation is None:
            continue
        name = _name(task.get("data"), sizes, where)
        if name in seen:
            raise ToCoError(f"{where}: the image {name!r:.100} comes a second time")
        seen.add(name)
        yield name, _label(annotation, numbers, sizes[name], f"{where} ({name:.100})")


def _newest(annotations: Any, where: str) -> list | None:
    """The regions of the annotation that was changed last; None without one."""
    if annotations in (None, []):
        return None
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise ToCoError(f"{where}: annotations are no list: export as JSON, not as JSON-MIN")
    kept = [a for a in annotations if not a.get("was_cancelled") and isinstance(a.get("result"), list)]
    if not kept:
        return None
    return max(enumerate(kept), key=lambda item: (str(item[1].get("updated_at") or ""), item[0]))[1]["result"]


def _name(data: Any, sizes: dict, where: str) -> str:
    """Which image a task is of: by the name that it was given, else by the end of its address."""
    data = data if isinstance(data, dict) else {}
    name, image = data.get("name"), data.get("image")
    if isinstance(name, str) and name in sizes:
        return name
    if not isinstance(image, str):
        raise ToCoError(f"{where} has no image")
    try:
        address = urlsplit(image)
        file = parse_qs(address.query).get("d", [unquote(address.path)])[0].rpartition("/")[2]
    except ValueError as error:
        raise ToCoError(f"{where}: {image!r:.100} is no address of an image: {error}") from None
    found = [n for n in (file, UPLOADED.sub("", file, count=1)) if n and without_suffix(n) in sizes]
    if not found:
        raise ToCoError(f"{where} is of {file or image!r:.100}, which is no image of the data set")
    return without_suffix(inside_name(found[0], where, "the data set"))


def _label(regions: list, numbers: dict[str, int], size: tuple[int, int], where: str) -> UInt8[np.ndarray, "H W"]:
    label = np.zeros(size, np.uint8)
    for region in regions:
        kind = region.get("type") if isinstance(region, dict) else None
        value = region.get("value") if isinstance(region, dict) else None
        if not isinstance(kind, str) or not isinstance(value, dict):
            raise ToCoError(f"{where}: a region has no type or no value")
        if kind.lower() in ("choices", "textarea", "rating", "number", "taxonomy"):  # about the image, not its pixels
            continue
        if kind.lower() != "brushlabels" or value.get("format") != "rle":
            raise ToCoError(f"{where}: a region is {kind!r:.60}; {AWAY}")
        names = value.get("brushlabels")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in numbers:
            raise ToCoError(f"{where}: a region is labelled {names!r:.100}: one of {', '.join(numbers)} is wanted")
        label[unpacked(value.get("rle"), size, where)] = numbers[names[0]]
    return label


def unpacked(given: Any, size: tuple[int, int], where: str) -> Bool[np.ndarray, "H W"]:
    """The pixels of a brush region. Raises ToCoError where its bytes are none, or of another size."""
    wrong = f"{where}: a brush region is no RLE of {size[0]} x {size[1]}"
    if not isinstance(given, list) or not all(type(n) is int and 0 <= n <= 255 for n in given):
        raise ToCoError(f"{wrong}: bytes are wanted")
    n = CHANNELS * size[0] * size[1]
    refuse_above("image_pixels", n // CHANNELS, where, "pixels")
    bits = _Bits(bytes(given))
    try:
        if bits.take(32) != n:
            raise ToCoError(f"{wrong}: it has another number of pixels")
        word, counts = bits.take(5) + 1, [bits.take(4) + 1 for _ in range(4)]
        values, at = np.zeros(n, bool), 0
        while at < n:
            repeated, count = bits.take(1), bits.take(counts[bits.take(2)]) + 1
            if at + count > n:
                raise ToCoError(f"{wrong}: it has too many pixels")
            if repeated:
                values[at : at + count] = bits.take(word) > 0
            else:
                values[at : at + count] = [bits.take(word) > 0 for _ in range(count)]
            at += count
    except EOFError:
        raise ToCoError(f"{wrong}: its bytes end too early") from None
    return values.reshape(*size, CHANNELS)[..., -1]


class _Bits:
    """Bits of some bytes, from the first one on; a window of them is looked at, as a whole number would cost."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, n: int) -> int:
        begin, end = self.at, self.at + n
        if end > 8 * len(self.data):
            raise EOFError
        self.at = end
        part = self.data[begin // 8 : (end + 7) // 8]
        return (int.from_bytes(part, "big") >> (-end % 8)) & ((1 << n) - 1)
