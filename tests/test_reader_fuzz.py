"""Damaged and hostile files: every reader ends in a result or in ToCoError; never a crash, a hang, or memory without
end.

The environment variable TOCO_FUZZ says how many damaged files each reader gets: here a few, 1000 before a release.
"""

import io
import json
import os
import pickle
import random
import signal
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from coco_folder import write_coco_folder
from PIL import Image
from safetensors.torch import save
from sbd_files import sbd_bytes
from voc_folder import rectangle_mask, smooth_image, write_voc_folder

from toco_core.config import tiny
from toco_core.data import COCOFolder, TagList, VOCFolder, read_image, read_mask
from toco_core.data.layouts.sbd import read_sbd_mask
from toco_core.errors import ToCoError
from toco_core.evaluation.scores import RunScores, read_scores
from toco_core.machine.files import read_tensors
from toco_core.runs.folder import Run
from toco_core.train.failures import load_failure

INPUTS = int(os.environ.get("TOCO_FUZZ", "25"))
SECONDS = 20  # for one input; a hang takes longer
MEGABYTES = 1000  # by which the process may grow over all inputs of a reader
TOKENS = (
    *(b"../", b"/etc/passwd", b"..\\", b"C:\\x", b"\0", b"\xff\xfe", b"-1", b"0", b"1e999", b"NaN", b"null", b"{}"),
    *(b"[", b"]", b'"', b",", b"\n", b"true", b"9" * 400, b"9" * 5000, b"[" * 3000, b"255", b"\xef\xbb\xbf", b"1e-9"),
    *(struct.pack("<I", n) for n in (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)),
    *(struct.pack(">I", n) for n in (2**16, 2**31 - 1)),
    *(struct.pack("<Q", n) for n in (2**40, 2**62, 2**64 - 1)),
)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, bytes, parts cut, repeated or moved, numbers and words put in."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(content) + 1)
        other = min(len(content), at + chance.choice((1, 2, 8, 64, 1024)))
        kind = chance.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << chance.randrange(8)
        elif kind == 1 and content:
            content[at % len(content)] = chance.randrange(256)
        elif kind == 2:
            del content[at:other]
        elif kind == 3:
            content[at:at] = content[at:other] * chance.choice((1, 2, 50))
        elif kind == 4:
            del content[at:]
        elif kind == 5:
            content[at:at] = chance.choice(TOKENS)
        else:
            token = chance.choice(TOKENS)
            content[at : at + len(token)] = token
    return bytes(content)


class Hang(BaseException):
    """The time for one input is over."""


def peak_megabytes() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ends_well(read, what: str) -> bool:
    """Whether there was a result; an error of another kind than ours passes on."""

    def over(*_):
        raise Hang(what)

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    try:
        read()
        return True
    except ToCoError as error:
        assert str(error) and "Traceback" not in str(error)
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def encoded(array, kind, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def saved(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def npy(content) -> bytes:
    file = io.BytesIO()
    np.save(file, content, allow_pickle=True)
    return file.getvalue()


STATE = {
    "model": {"weight": torch.ones(3, 2), "bias": torch.zeros(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 2)}}, "param_groups": []},
    "step": 3, "config": tiny().to_dict(), "best": 3.5, "skipped": 0,
}  # fmt: skip
FAILURE = {"step": 1, "message": "m", "config": tiny().to_dict(), "model": {}, "batch": {}, "names": ["a"]}
SCORES = {name: {} for name in RunScores._fields} | {"iou": {"cam": [1.0, None]}, "miou": {"cam": 1.0}, "part": "val"}
ROWS = {"img_0": np.array([1, 0, 1], np.uint8), "img_1": np.array([0, 1, 0], np.float32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A VOC folder, a COCO folder, tags and a run: what the readers of lists need around the damaged file."""
    root = tmp_path_factory.mktemp("fuzz")
    voc, coco = write_voc_folder(root / "voc", n=2), write_coco_folder(root / "coco")
    (voc / "Annotations").mkdir()
    for i in range(2):
        objects = "<object><name>cat</name></object>"
        (voc / "Annotations" / f"img_{i}.xml").write_text(f"<annotation>{objects}</annotation>")
    tags = root / "tags"
    tags.mkdir()
    for name in ("a.png", "b.png"):
        (tags / name).write_bytes(encoded(smooth_image(12, 16, 1), "PNG"))
    (tags / "tags.csv").write_text("file,tags,split\na.png,cat;dog,train\nb.png,dog,val\n")
    (tags / "tags.json").write_text(json.dumps([{"file": "a.png", "tags": ["cat"]}, {"file": "b.png", "tags": []}]))
    run = Run(root / "run")
    run.begin(tiny())
    run.log({"step": 0, "total": 1.5})
    run.finish({"cam_miou": 20.5})
    run.keep_scores(SCORES)
    for name, content in {"checkpoint.pt": saved(STATE), "failure.pt": saved(FAILURE)}.items():
        (run.folder / name).write_bytes(content)
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    return root, voc, coco, tags, run


GREY = rectangle_mask(16, 20, 2)
FILES = {
    "photo.jpg": encoded(smooth_image(24, 32, 0), "JPEG"),
    "photo.png": encoded(smooth_image(24, 32, 0), "PNG"),
    "photo.bmp": encoded(smooth_image(8, 12, 0), "BMP"),
    "mask.png": encoded(GREY, "PNG"),
    "mask16.png": encoded(GREY.astype(np.uint16), "PNG"),
    "packed.mat": sbd_bytes(rectangle_mask(16, 20, 2)),
    "plain.mat": sbd_bytes(rectangle_mask(16, 20, 2), compressed=False),
    "mapping.npy": npy(np.array(ROWS, dtype=object)),
    "array.npy": npy(np.eye(2, 3, dtype=np.uint8)),
    "weights.pth": saved(STATE["model"]),
    "weights.safetensors": save(STATE["model"]),
}


def labelled(voc, path):
    return VOCFolder(voc, "train", labels=path).image_labels


READERS = {
    "photo.jpg": lambda f: (f[0] / "photo.jpg", read_image),
    "photo.png": lambda f: (f[0] / "photo.png", read_image),
    "photo.bmp": lambda f: (f[0] / "photo.bmp", read_image),
    "mask.png": lambda f: (f[0] / "mask.png", read_mask),
    "mask16.png": lambda f: (f[0] / "mask16.png", read_mask),
    "packed.mat": lambda f: (f[0] / "packed.mat", read_sbd_mask),
    "plain.mat": lambda f: (f[0] / "plain.mat", read_sbd_mask),
    "mapping.npy": lambda f: (f[0] / "mapping.npy", lambda path: labelled(f[1], path)),
    "array.npy": lambda f: (f[0] / "array.npy", lambda path: labelled(f[1], path)),
    "list": lambda f: (f[1] / "ImageSets/Segmentation/train.txt", lambda _: len(VOCFolder(f[1], "train"))),
    "classes": lambda f: (f[1] / "classes.txt", lambda _: VOCFolder(f[1], "train").image_labels),
    "xml": lambda f: (
        f[1] / "Annotations/img_0.xml",
        lambda _: VOCFolder(f[1], "train", labels="xml").image_labels,
    ),
    "coco": lambda f: (
        next((f[2] / "annotations").glob("*train*.json")),
        lambda path: [COCOFolder(path).mask(0), COCOFolder(path).image_labels],
    ),
    "csv": lambda f: (f[3] / "tags.csv", lambda path: TagList(path, "train").image_labels),
    "json": lambda f: (f[3] / "tags.json", lambda path: TagList(path, "train").image_labels),
    "config": lambda f: (f[4].folder / "config.json", lambda _: f[4].config()),
    "manifest": lambda f: (f[4].folder / "manifest.json", lambda _: f[4].manifest()),
    "log": lambda f: (f[4].folder / "metrics.jsonl", lambda _: f[4].records()),
    "scores": lambda f: (f[4].folder / "scores.json", lambda _: read_scores(f[4])),
    "checkpoint": lambda f: (f[4].folder / "checkpoint.pt", lambda _: f[4].load()),
    "failure": lambda f: (f[4].folder / "failure.pt", lambda _: load_failure(f[4])),
    "weights.pth": lambda f: (f[0] / "weights.pth", lambda path: read_tensors(path, "weights")),
    "weights.safetensors": lambda f: (f[0] / "weights.safetensors", lambda path: read_tensors(path, "weights")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="hangs are told by an alarm")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files(folders, name):
    path, read = READERS[name](folders)
    whole, chance = path.read_bytes(), random.Random(name)
    if name != "failure":  # whose model is left out here: it is refused before it is damaged
        assert ends_well(lambda: read(path), name)
    before = peak_megabytes()
    try:
        for number in range(INPUTS):
            content = damaged(whole, chance)
            path.write_bytes(content)
            try:
                ends_well(lambda: read(path), f"{name} number {number}")
            except BaseException as error:
                raise AssertionError(f"{name} number {number}, {content[:200]!r}: {error!r}") from error
    finally:
        path.write_bytes(whole)
    assert peak_megabytes() - before < MEGABYTES


def refused(folders, name, content, words):
    path, read = READERS[name](folders)
    whole, before = path.read_bytes(), peak_megabytes()
    path.write_bytes(content)
    try:
        with pytest.raises(ToCoError, match=words):
            read(path)
    finally:
        path.write_bytes(whole)
    assert peak_megabytes() - before < 200


def header(shape, dtype="|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def packed(content: bytes) -> bytes:
    """A checkpoint whose parts are compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    return file.getvalue()


def test_bombs_are_refused(folders):
    """Small files that claim, or would become, gigabytes."""
    huge = bytearray(FILES["photo.png"])
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    refused(folders, "photo.png", bytes(huge), "photo.png (is refused|is 60000 x 60000)")
    refused(folders, "array.npy", header((10**6, 10**6)) + b"1", "is not a NumPy file of image labels: 1 bytes for")
    laughs = [1, 0, 1]
    for _ in range(40):
        laughs = [laughs, laughs]
    refused(folders, "mapping.npy", npy(np.array({"img_0": laughs}, object)), "'img_0' has no row of labels")
    long_memo = header((), "|O") + b"\x80\x04Nr\xff\xff\xff\xff."  # an index for which the C version makes 64 GB
    refused(folders, "mapping.npy", long_memo, "holds a NoneType")
    long_bytes = header((), "|O") + b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"."
    refused(folders, "mapping.npy", long_bytes, "is not a NumPy file of image labels")
    wide = {"weight": torch.ones(1).expand(10**12)}
    refused(folders, "weights.pth", saved(wide), "weights.pth.* cannot be read")
    refused(
        folders, "checkpoint", packed(saved(STATE | {"more": torch.zeros(50_000_000)})), "cannot be read as a check"
    )
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "lol"}">' for i in range(12))
    bomb = f"<!DOCTYPE a [{entities}]><annotation><object><name>&e11;</name></object></annotation>"
    refused(folders, "xml", bomb.encode(), "is not valid XML")
    refused(folders, "json", b"[" * 200_000, "is not valid JSON")


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "C:\\secret"])
def test_no_list_leads_out_of_its_folder(folders, place):
    words = "is not a name inside"
    refused(folders, "list", f"{place}\n".encode(), words)
    refused(folders, "csv", f"file,tags\n{place}.png,cat\n".encode(), words)
    refused(folders, "json", json.dumps([{"file": f"{place}.png", "tags": ["cat"]}]).encode(), words)
    path, _ = READERS["coco"](folders)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = f"{place}.jpg"
    refused(folders, "coco", json.dumps(content).encode(), words)


def test_pickles_of_many_protocols_are_read(folders):
    """What older versions of Python and NumPy wrote, mapping in a pickle of its own protocol."""
    path, read = READERS["mapping.npy"](folders)
    whole = path.read_bytes()
    for protocol in (2, 3, 4):
        path.write_bytes(header((), "|O") + pickle.dumps(np.array(ROWS, dtype=object), protocol=protocol))
        assert read(path).tolist() == [[1, 0, 1], [0, 1, 0]]
    path.write_bytes(whole)
