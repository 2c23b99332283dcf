"""Label maps out to Label Studio and CVAT, corrected, and back in: their formats bit by bit, and whole round trips."""

import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from killed_training import config_of
from PIL import Image
from small_config import stir
from voc_folder import SIZES, smooth_image, write_voc_folder

import toco_core.__main__ as toco
from toco_core.data import open_source
from toco_core.data.layouts import cvat, label_studio
from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.predict.corrections import write_corrected, write_for_annotation
from toco_core.predict.export import export, palette_png

NAMES = ("background", "cat", "dog", "sheep")


def random_label(height, width, seed):
    """Blocks of background, three classes and 255."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 0, 1, 2, 3, 255], (4, 5)).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.NEAREST))


def bit_by_bit(data):
    """A brush region as Label Studio's own decoder reads it: the package in JavaScript, a value at a time."""
    bits = "".join(f"{byte:08b}" for byte in data)
    at = 0

    def take(n):
        nonlocal at
        at += n
        return int(bits[at - n : at], 2)

    n, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    values = []
    while len(values) < n:
        repeated = take(1)
        count = take(sizes[take(2)]) + 1
        values += [take(word)] * count if repeated else [take(word) for _ in range(count)]
    return values


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """An export of six images, whose label maps are replaced by ones with every class and 255; one in a folder."""
    root = tmp_path_factory.mktemp("labels")
    data = write_voc_folder(root / "data", n=5)
    config = config_of(str(data), root / "runs")
    source = open_source(data, "train")
    torch.manual_seed(0)
    model = ToCo(config.model, source.n_classes)
    stir(model, 0.3)
    out = root / "my labels"
    export(model, source, out, config, method="cam", progress=False)
    for i in range(5):
        (out / "SegmentationClass" / f"img_{i}.png").write_bytes(palette_png(random_label(*SIZES[i % 4], i)))
    return out


def mask_of(folder, name):
    return np.array(Image.open(folder / "SegmentationClass" / f"{name}.png"))


# ---- Label Studio


@pytest.mark.parametrize("seed", range(6))
def test_brush_regions_are_those_of_label_studio(seed):
    """Runs of every length: single pixels, and one longer than a count can say."""
    rng = np.random.default_rng(seed)
    height, width = ((5, 7), (1, 1), (211, 173), (40, 60), (3, 90), (300, 310))[seed]
    mask = rng.random((height, width)) < (0.5, 1.0, 0.02, 0.9, 0.1, 0.0)[seed]
    data = label_studio.packed(mask)
    np.testing.assert_array_equal(
        np.reshape(bit_by_bit(data), (height, width, 4)), np.repeat(255 * mask[..., None], 4, 2)
    )
    np.testing.assert_array_equal(label_studio.unpacked(data, (height, width), "x"), mask)


def test_blocks_that_are_not_repeated_are_read():
    """As the browser writes them: some values one after the other, with other lengths of counts and words."""
    values = [0, 0, 0, 255, 7, 7, 7, 7, 9, 9, 9, 1, 0, 5, 5, 0, 0, 0, 0, 0, 2, 2, 2, 2]
    bits = f"{24:032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in (2, 5, 9, 12))
    bits += "0" + "01" + f"{13 - 1:05b}" + "".join(f"{v:08b}" for v in values[:13])
    bits += "0" + "00" + f"{2 - 1:02b}" + "".join(f"{v:08b}" for v in values[13:15])
    bits += "1" + "11" + f"{5 - 1:012b}" + f"{0:08b}" + "1" + "10" + f"{4 - 1:09b}" + f"{2:08b}"
    bits += "0" * (-len(bits) % 8)
    data = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert bit_by_bit(data) == values
    alpha = np.reshape(values, (2, 3, 4))[..., 3] > 0
    np.testing.assert_array_equal(label_studio.unpacked(data, (2, 3), "x"), alpha)


def as_exported(tasks, changes):
    """What Label Studio's "JSON" is: the predictions accepted as annotations, some of them changed."""
    exported = []
    for number, task in enumerate(tasks, start=1):
        regions = changes.get(task["data"]["name"], task["predictions"][0]["result"])
        annotation = {
            "id": number, "completed_by": 1, "was_cancelled": False, "lead_time": 3.2, "result": regions,
            "updated_at": "2026-01-02T03:04:05.000000Z",
        }  # fmt: skip
        exported.append(
            {"id": number, "annotations": [annotation], "predictions": [], "data": task["data"], "meta": {}}
        )
    return exported


def region(mask, label, **more):
    value = {"format": "rle", "rle": label_studio.packed(mask), "brushlabels": [label]}
    return {"id": "x", "type": "brushlabels", "from_name": "label", "to_name": "image", "value": value} | more


def test_a_round_trip_through_label_studio(labels, tmp_path):
    path = write_for_annotation(labels, "label-studio")
    tasks = json.loads(path.read_text())
    assert [task["data"]["name"] for task in tasks] == [f"img_{i}" for i in range(5)]
    assert tasks[2]["data"]["image"] == "/data/local-files/?d=my%20labels/JPEGImages/img_2.jpg"
    assert (tasks[1]["predictions"][0]["result"][0]["original_height"]) == SIZES[1][0]
    interface = path.with_suffix(".xml").read_text()
    assert re.findall(r'Label value="(\w+)" background="(#\w+)"', interface) == [
        ("cat", "#800000"), ("dog", "#008000"), ("sheep", "#808000"), ("ignored", "#e0e0c0")
    ]  # fmt: skip

    corrected = random_label(*SIZES[1], 99)
    parts = [region(corrected == k, name) for k, name in ((1, "cat"), (2, "dog"), (3, "sheep"), (255, "ignored"))]
    everything = region(np.ones(SIZES[1], bool), "sheep")  # below the others, and to be painted over
    ground = np.where(corrected == 0, 3, corrected)
    exported = as_exported(tasks, {"img_1": [everything, {"type": "choices", "value": {"choices": ["good"]}}, *parts]})
    exported[3]["annotations"] = []  # nobody looked at it
    exported[4]["annotations"][0]["was_cancelled"] = True
    old = exported[1]["annotations"][0] | {"result": [], "updated_at": "2025-12-31T00:00:00Z"}
    exported[1]["annotations"].append(old)
    del exported[0]["data"]["name"]
    exported[0]["data"]["image"] = "/data/upload/3/1a2b3c4d-img_0.jpg"
    (tmp_path / "project-1.json").write_text(json.dumps(exported))
    found = write_corrected(labels, tmp_path / "project-1.json", tmp_path / "new")
    assert (found.n_images, found.corrected) == (5, ("img_0", "img_1", "img_2"))
    for i in range(5):
        expected = ground if i == 1 else mask_of(labels, f"img_{i}")
        np.testing.assert_array_equal(mask_of(tmp_path / "new", f"img_{i}"), expected, err_msg=str(i))
    back = open_source(tmp_path / "new", "train")
    assert back.class_names == NAMES and len(back) == 5 and len(open_source(tmp_path / "new", "corrected")) == 3
    assert back.check().n_masks == 5


def first(exported):
    """The first region of the second task."""
    return exported[1]["annotations"][0]["result"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: first(e).update(type="polygonlabels"), "task 2 .img_1.: a region is 'polygonlabels'; only brush"),
        (lambda e: first(e)["value"].update(brushlabels=["cow"]), r"labelled \['cow'\]: one of cat, dog, sheep, ign"),
        (lambda e: first(e)["value"].update(rle=[0, 0]), "its bytes end too early"),
        (lambda e: first(e)["value"].update(rle=[0, 0, 0, 4] + [0] * 9), "another number of pixels"),
        (lambda e: first(e)["value"].update(rle="a"), "bytes are wanted"),
        (lambda e: e[1]["annotations"][0]["result"].insert(0, 3), "a region has no type"),
        (lambda e: e[1].update(data={"image": "/data/upload/x.jpg"}), "task 2 is of 'x.jpg', which is no image"),
        (lambda e: e[1].update(data=None), "task 2 has no image"),
        (lambda e: e[1].update(data=e[0]["data"]), "'img_0' comes a second time"),
        (lambda e: e[1].update(annotations={"a": 1}), "export as JSON, not as JSON-MIN"),
        (lambda e: [task.update(annotations=[]) for task in e], "nothing was corrected"),
        (lambda e: e.insert(0, 3), "is no export of Label Studio"),
    ],
)  # fmt: skip
def test_what_is_no_export_of_label_studio_is_refused(labels, tmp_path, change, words):
    exported = as_exported(json.loads(write_for_annotation(labels, "label-studio").read_text()), {})
    change(exported)
    (tmp_path / "e.json").write_text(json.dumps(exported))
    with pytest.raises(ToCoError, match=words):
        write_corrected(labels, tmp_path / "e.json", tmp_path / "new")


def test_label_studios_own_converter_agrees():
    """Where its package is installed."""
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    mask = np.random.default_rng(1).random((17, 23)) < 0.4
    flat = np.repeat(255 * mask.ravel().astype(np.uint8), 4)
    np.testing.assert_array_equal(brush.decode_rle(label_studio.packed(mask)), flat)
    np.testing.assert_array_equal(label_studio.unpacked(brush.encode_rle(flat), mask.shape, "x"), mask)


# ---- CVAT


def unzipped(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def rgb_png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_a_round_trip_through_cvat(labels, tmp_path):
    files = unzipped(write_for_annotation(labels, "cvat"))
    assert files["labelmap.txt"].decode().splitlines() == [
        "# label:color_rgb:parts:actions", "background:0,0,0::", "cat:128,0,0::", "dog:0,128,0::", "sheep:128,128,0::",
        "ignored:224,224,192::",
    ]  # fmt: skip
    assert files["ImageSets/Segmentation/default.txt"].decode().split() == [f"img_{i}" for i in range(5)]
    shown = Image.open(io.BytesIO(files["SegmentationClass/img_3.png"]))
    assert shown.mode == "RGB" and shown.size == SIZES[3][::-1]
    label = mask_of(labels, "img_3")
    np.testing.assert_array_equal((np.asarray(shown) == (224, 224, 192)).all(2), label == 255)

    # CVAT gives colours of its own, an order of its own, and only the masks that were looked at
    colours = {0: (0, 0, 0), 1: (250, 50, 83), 2: (61, 245, 61), 3: (1, 2, 3), 255: (4, 5, 6)}
    corrected = random_label(*SIZES[2], 77)
    painted = np.zeros((*corrected.shape, 3), np.uint8)
    for k, colour in colours.items():
        painted[corrected == k] = colour
    names = {1: "cat", 2: "dog", 3: "sheep", 255: "ignored"}
    lines = [f"{names[k]}:{','.join(map(str, colours[k]))}::" for k in (255, 3, 1, 2)]
    content = {
        "labelmap.txt": "# label:color_rgb:parts:actions\n" + "\n".join([*lines, "background:0,0,0::", "tree:9,9,9::"]),
        "ImageSets/Segmentation/default.txt": "img_2\nJPEGImages/img_0\n",
        "SegmentationClass/img_2.png": rgb_png(painted),
        "SegmentationClass/JPEGImages/img_0.png": rgb_png(np.zeros((*SIZES[0], 3), np.uint8)),
        "SegmentationObject/img_2.png": b"not looked at",
    }
    found = write_corrected(labels, zipped(tmp_path / "task.zip", content), tmp_path / "new")
    assert found.corrected == ("img_0", "img_2")
    expected = {i: mask_of(labels, f"img_{i}") for i in range(5)} | {2: corrected, 0: np.zeros(SIZES[0])}
    for i in range(5):
        np.testing.assert_array_equal(mask_of(tmp_path / "new", f"img_{i}"), expected[i])

    mine = shutil.copytree(labels, tmp_path / "mine")
    for seed, link in ((1, "copy"), (2, "link")):  # the picture of before stayed where another was put in its place
        image, file = Image.fromarray(smooth_image(*SIZES[1], seed)), mine / "JPEGImages" / "img_1.jpg"
        file.unlink()
        image.save(file)
        write_corrected(mine, tmp_path / "task.zip", tmp_path / "twice", images=link)
        assert (tmp_path / "twice" / "JPEGImages" / "img_1.jpg").read_bytes() == file.read_bytes()

    with zipfile.ZipFile(tmp_path / "task.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "no.where").symlink_to("nothing")
    assert write_corrected(labels, tmp_path / "unpacked", tmp_path / "again").corrected == ("img_0", "img_2")
    np.testing.assert_array_equal(mask_of(tmp_path / "again", "img_2"), corrected)
    (tmp_path / "unpacked" / "notes.txt").write_text("what is not read makes no other set of corrections")
    assert write_corrected(labels, tmp_path / "unpacked", tmp_path / "again").corrected == ("img_0", "img_2")
    with pytest.raises(ToCoError, match="/ has no labelmap.txt"):  # at once, whatever lies below it
        write_corrected(labels, "/", tmp_path / "third")


def test_our_own_archive_and_grey_masks_come_back(labels, tmp_path):
    path = write_for_annotation(labels, "cvat")
    sizes = {f"img_{i}": SIZES[i % 4] for i in range(5)}
    for name, label in cvat.read_archive(path, NAMES, sizes):
        np.testing.assert_array_equal(label, mask_of(labels, name))
    grey = np.array([[0, 1, 2], [3, 4, 0]], np.uint8)
    lines = "background:::\nsheep:::\ncat:::\ndog:::\nignored:::"
    content = {"labelmap.txt": lines, "SegmentationClass/a.png": rgb_png(grey)}
    ((_, label),) = cvat.read_archive(zipped(tmp_path / "grey.zip", content), NAMES, {"a": (2, 3)})
    np.testing.assert_array_equal(label, [[0, 3, 1], [2, 255, 0]])


def test_black_is_background_whether_or_not_the_label_map_says_so(tmp_path):
    """It was no number then: TypeError, found by mutated archives."""
    painted = np.array([[[0, 0, 0], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]], np.uint8)
    content = {"labelmap.txt": "dog:1,0,0::\n", "SegmentationClass/a.png": rgb_png(painted)}
    ((_, label),) = cvat.read_archive(zipped(tmp_path / "a.zip", content), NAMES, {"a": (2, 2)})
    np.testing.assert_array_equal(label, [[0, 2], [2, 0]])


def test_parts_become_objects():
    label = np.array([[1, 1, 0, 2], [0, 0, 0, 2], [1, 0, 255, 2]], np.uint8)
    parts = cvat.objects_of(label)
    assert (parts == 0).sum() == (label == 0).sum() and len(np.unique(parts)) == 5
    assert len({int(parts[0, 0]), int(parts[2, 0]), int(parts[0, 3]), int(parts[2, 2])}) == 4
    dots = np.zeros((40, 40), np.uint8)
    dots[::2, ::2] = 1
    assert set(np.unique(cvat.objects_of(dots))) == {0, 1}  # 400 of them


PLAIN = "background:0,0,0::\ncat:1,0,0::\n"
RED, GREY = (rgb_png(np.full((2, 3, 3), colour, np.uint8)) for colour in ((1, 0, 0), (9, 9, 9)))


@pytest.mark.parametrize(
    ("labelmap", "mask", "content", "words"),
    [
        (None, "a.png", RED, "has no labelmap.txt"),
        (PLAIN, None, RED, "has no masks in SegmentationClass/"),
        (b"\xff", "a.png", RED, "is no label map"),
        ("cat\n", "a.png", RED, "is no label map"),
        ("cat:1,2::", "a.png", RED, "'1,2' is no colour"),
        ("cat:1,2,256::", "a.png", RED, "'1,2,256' is no colour"),
        (PLAIN, "b.png", RED, "is the mask of 'b', which is no image"),
        (PLAIN, "../../a.png", RED, "is not a name inside"),
        (PLAIN, "a.png", b"x", "is not a readable PNG or BMP file"),
        (PLAIN, "a.png", GREY, "a pixel of 090909"),
        (PLAIN, "a.png", rgb_png(np.zeros((3, 2, 3), np.uint8)), "is 3 x 2, its image is 2 x 3"),
        ("cow:1,0,0::", "a.png", RED, "shows the label 'cow', which is no class"),
    ],
)
def test_what_is_no_export_of_cvat_is_refused(tmp_path, labelmap, mask, content, words):
    files = {} if labelmap is None else {"labelmap.txt": labelmap}
    files |= {} if mask is None else {f"SegmentationClass/{mask}": content}
    with pytest.raises(ToCoError, match=words):
        list(cvat.read_archive(zipped(tmp_path / "a.zip", files), NAMES, {"a": (2, 3)}))


def test_archives_that_are_bombs_are_refused(tmp_path, monkeypatch):
    (tmp_path / "no.zip").write_bytes(b"nothing")
    with pytest.raises(ToCoError, match="no.zip is no ZIP archive"):
        list(cvat.read_archive(tmp_path / "no.zip", NAMES, {}))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labelmap.txt", PLAIN)
        archive.writestr("SegmentationClass/a.png", bytes(2**21))
    monkeypatch.setenv("TOCO_LIMITS", "image_bytes=1e6")
    with pytest.raises(ToCoError, match="SegmentationClass/a.png has 2097152 bytes: at most 1000000 are read"):
        list(cvat.read_archive(tmp_path / "bomb.zip", NAMES, {"a": (2, 3)}))
    lying = bytearray((tmp_path / "bomb.zip").read_bytes())
    at = lying.rfind(b"PK\1\2") + 24
    lying[at : at + 4] = (100).to_bytes(4, "little")  # it says that it is small
    (tmp_path / "lying.zip").write_bytes(lying)
    with pytest.raises(ToCoError, match="(cannot be unpacked|is not a readable|bytes or more)"):
        list(cvat.read_archive(tmp_path / "lying.zip", NAMES, {"a": (2, 3)}))
    monkeypatch.setenv("TOCO_LIMITS", "archive_list_bytes=100")
    with pytest.raises(ToCoError, match="its list of files has .* bytes: at most 100 are read"):
        list(cvat.read_archive(tmp_path / "bomb.zip", NAMES, {"a": (2, 3)}))


# ---- both


@pytest.mark.parametrize("kind", ["label-studio", "cvat"])
def test_a_class_that_is_called_as_255_is_refused(labels, tmp_path, kind):
    """Its pixels came back as 255."""
    path = write_for_annotation(labels, kind)
    if kind == "label-studio":
        path = tmp_path / "exported.json"
        path.write_text(json.dumps(as_exported(json.loads((labels / "label_studio.json").read_text()), {})))
    own = tmp_path / "own"
    shutil.copytree(labels, own)
    (own / "classes.txt").write_text("background\ncat\nignored\nsheep\n")
    message = "class 'ignored' is not allowed here: it is what 255 is called; rename the class"
    for file in ("label_studio.json", "label_studio.xml", "cvat.zip"):
        (own / file).unlink(missing_ok=True)
    before = sorted(own.rglob("*"))
    with pytest.raises(ToCoError, match=message):
        write_for_annotation(own, kind)
    with pytest.raises(ToCoError, match=message):
        write_corrected(own, path, tmp_path / "new")
    assert sorted(own.rglob("*")) == before and not (tmp_path / "new").exists()


# ---- from the shell


def test_wrong_calls_are_told(labels, tmp_path):
    with pytest.raises(ToCoError, match="exported = '' is not allowed: what Label Studio or CVAT exported"):
        write_corrected(labels, "", tmp_path / "x")
    with pytest.raises(ToCoError, match="format = 'vott' is not allowed: one of label-studio, cvat"):
        write_for_annotation(labels, "vott")
    with pytest.raises(ToCoError, match="holds no labels: a folder that `toco export`"):
        write_for_annotation(tmp_path, "cvat")
    with pytest.raises(ToCoError, match="split = 'test' is not in"):
        write_for_annotation(labels, "cvat", split="test")
    with pytest.raises(ToCoError, match="class 'a:b' cannot stand in labelmap.txt"):
        cvat.write_archive(io.BytesIO(), [], ("background", "a:b"))


def test_the_command_reads_them_back(labels, tmp_path, capsys):
    path = write_for_annotation(labels, "cvat")
    assert toco.main(["corrected", str(labels), str(path), str(tmp_path / "new"), "--images", "none"]) == 0
    assert "5 label maps, 5 of them corrected" in capsys.readouterr().out
    assert not (tmp_path / "new" / "JPEGImages").exists()
    with pytest.raises(SystemExit, match="error: .*is no export of Label Studio"):
        (tmp_path / "x.json").write_text("{}")
        toco.main(["corrected", str(labels), str(tmp_path / "x.json"), str(tmp_path / "other")])
