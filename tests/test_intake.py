"""One gate for every file from outside: pipes, devices, endless files, limits that can be raised by name."""

import io
import os
import socket
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from voc_folder import rectangle_mask, save_palette_mask, smooth_image, write_voc_folder

import toco_core.predict.label as labelling
from toco_core.data import COCOFolder, TagList, VOCFolder, open_source, read_image, read_mask
from toco_core.data.files import image_size
from toco_core.data.layouts.cvat import read_archive, write_archive
from toco_core.data.layouts.npy import read_npy_labels
from toco_core.data.layouts.sbd import read_sbd_mask
from toco_core.errors import ToCoError
from toco_core.machine.files import read_tensors
from toco_core.machine.intake import DEFAULTS, limit, read_bytes, set_limits
from toco_core.runs.folder import Run

READ = {
    "image.jpg": read_image,
    "mask.png": read_mask,
    "mask.mat": read_sbd_mask,
    "labels.npy": read_npy_labels,
    "tags.csv": TagList,
    "tags.json": TagList,
    "instances_train.json": COCOFolder,
    "weights.pth": lambda path: read_tensors(path, "weights"),
    "weights.safetensors": lambda path: read_tensors(path, "weights"),
    "config.json": lambda path: Run(path.parent).config(),
    "manifest.json": lambda path: Run(path.parent).manifest(),
    "metrics.jsonl": lambda path: Run(path.parent).records(),
    "photographs.jsonl": lambda path: labelling._Log(path, 3),
    "checkpoint.pt": lambda path: Run(path.parent).load() or read_tensors(path, "weights"),
}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setenv("TOCO_LIMITS", "")


def refused(name, path):
    began = time.process_time()
    with pytest.raises(ToCoError) as caught:
        READ[name](path)
    assert time.process_time() - began < 5
    text = str(caught.value)
    assert name in text and "\n" not in text and len(text) < 1000
    return text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", READ)
def test_pipes_devices_and_sockets_do_not_block(tmp_path, name):
    """A pipe called img_0.jpg hung for ever; a link to /dev/zero took all memory."""
    path = tmp_path / name
    os.mkfifo(path)
    refused(name, path)
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(name, path)
    path.unlink()
    path.mkdir()
    refused(name, path)
    path.rmdir()
    path.symlink_to(path)
    refused(name, path)


@pytest.mark.parametrize("name", READ)
def test_a_hundred_gigabytes_of_holes_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"[")
    os.truncate(path, 100 << 30)
    assert f"has {100 << 30} bytes: at most" in refused(name, path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no such file here")
def test_a_file_whose_first_bytes_cannot_be_read_is_told():
    with pytest.raises(ToCoError, match="/proc/self/mem cannot be read: Input/output error"):
        image_size("/proc/self/mem")


def test_a_file_that_does_not_say_its_size_is_read_to_its_limit(tmp_path, monkeypatch):
    maps = "/proc/self/maps"
    if not os.path.exists(maps):
        pytest.skip("no such file here")
    assert len(read_bytes(maps, "text_bytes")) > 1000
    monkeypatch.setenv("TOCO_LIMITS", "text_bytes=1000")
    with pytest.raises(ToCoError, match="/proc/self/maps has .* bytes or more: at most 1000 are read"):
        read_bytes(maps, "text_bytes")


def test_lists_and_annotations_pass_the_gate(tmp_path):
    root = write_voc_folder(tmp_path / "voc", n=2)
    listed = root / "ImageSets" / "Segmentation" / "train.txt"
    os.truncate(listed, 100 << 30)
    with pytest.raises(ToCoError, match="train.txt has .* bytes"):
        VOCFolder(root, "train")
    listed.write_text("img_0\n")
    (root / "Annotations").mkdir()
    (root / "Annotations" / "img_0.xml").symlink_to("/dev/zero")
    with pytest.raises(ToCoError, match="img_0.xml cannot be read: it is a device"):
        VOCFolder(root, "train", labels="xml").image_labels  # noqa: B018


def test_limits_are_raised_by_name(tmp_path):
    Image.fromarray(smooth_image(30, 44, 0)).save(tmp_path / "a.png")
    set_limits(image_pixels=1319)
    with pytest.raises(ToCoError, match=r"a.png is 30 x 44 and has 1320 pixels: .*TOCO_LIMITS=image_pixels=1320"):
        read_image(tmp_path / "a.png")
    set_limits(image_bytes=10**9, image_pixels=1320)
    assert os.environ["TOCO_LIMITS"] == "image_bytes=1000000000,image_pixels=1320"
    assert read_image(tmp_path / "a.png").shape == (30, 44, 3)
    assert limit("image_bytes") == 10**9 and limit("npy_bytes") == DEFAULTS["npy_bytes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixels=3", "TOCO_LIMITS names 'pixels': known are image_bytes"),
        ("image_pixels=many", "image_pixels = 'many' is not allowed"),
        ("image_pixels=-5", "image_pixels = '-5' is not allowed"),
        ("image_pixels=inf", "image_pixels = 'inf' is not allowed"),
    ],
)
def test_limits_that_are_not_understood(monkeypatch, text, message):
    monkeypatch.setenv("TOCO_LIMITS", text)
    with pytest.raises(ToCoError, match=message):
        limit("image_pixels")


def many_scans(side, scans):
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * scans + b"\xff\xd9"


def test_a_jpeg_of_hundreds_of_scans_is_refused(tmp_path):
    """Each scan of a large image costs a whole decoding: 3000 took minutes."""
    path = tmp_path / "a.jpg"
    path.write_bytes(many_scans(64, 300))
    with pytest.raises(ToCoError, match="a.jpg has 30[0-9] scans: at most 100 are read"):
        read_image(path)
    path.write_bytes(many_scans(8000, 90))
    with pytest.raises(ToCoError, match="a.jpg has .* pixels in all its scans together: at most"):
        read_image(path)
    path.write_bytes(many_scans(64, 20) + b"\xff\xda" * 500)  # what follows the end is not decoded
    assert read_image(path).shape == (64, 64, 3)


def test_the_depth_of_a_png_is_read_from_its_header_chunk(tmp_path):
    """The 25th byte is the depth only where the header chunk comes first: it was divided by what stands there."""
    path = tmp_path / "a.png"
    mask = rectangle_mask(17, 23, 3)
    Image.fromarray(mask).save(path)
    data = path.read_bytes()
    comment = b"\x00\x00\x00\x0atEXt" + b"k\x00" + b"\x00" * 8
    import zlib

    chunk = comment + zlib.crc32(comment[4:]).to_bytes(4, "big")
    path.write_bytes(data[:8] + chunk + data[8:])
    try:
        np.testing.assert_array_equal(read_mask(path), mask)
    except ToCoError as error:  # a decoder may insist on the order
        assert "a.png" in str(error)


@pytest.mark.slow
def test_large_images_are_read_without_a_warning(tmp_path, recwarn):
    save_palette_mask(np.zeros((9500, 9500), np.uint8), tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").shape == (9500, 9500)
    assert not recwarn.list


def test_a_message_is_one_line_that_every_terminal_shows():
    text = str(ToCoError("caf\udce9\n\x1b[31mred \u202e, " + "x" * 9000))
    assert text.startswith(r"caf\udce9\n\x1b[31mred \u202e, xxx") and len(text) < 2100 and "..." in text
    text.encode("utf-8")
    assert str(ToCoError("Straße 猫: 3 × 4")) == "Straße 猫: 3 × 4"


@pytest.mark.skipif(sys.platform == "win32", reason="no such sockets")
def test_a_socket_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a.jpg"))
        with pytest.raises(ToCoError, match="a.jpg cannot be read: it is a socket"):
            read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "gone"])
def test_a_dataset_that_cannot_be_one(name):
    with pytest.raises(ToCoError):
        open_source(name)


@pytest.mark.parametrize("damage", ["version", "name", "nameless"])
def test_an_archive_whose_list_of_files_is_damaged_is_refused(tmp_path, damage):
    """Of a later ZIP version, with a name that is no UTF-8, with one of no letters: zipfile has an error for each."""
    path, label = tmp_path / "masks.zip", rectangle_mask(12, 14, 1)
    with path.open("wb") as file:
        write_archive(file, [("img", label)], ("background", "cat"))
    if damage == "nameless":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(zipfile.ZipInfo(""), b"")
        found = dict(read_archive(path, ("background", "cat"), {"img": label.shape}))
        assert np.array_equal(found["img"], label) and list(found) == ["img"]
        return
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    if damage == "version":
        data[entry + 6] = 129
    else:
        data[entry + 9] |= 8  # the name is said to be UTF-8
        data[entry + 46] = 0xD4
    path.write_bytes(data)
    with pytest.raises(ToCoError, match=r"masks\.zip is no ZIP archive"):
        list(read_archive(path, ("background", "cat"), {"img": label.shape}))
