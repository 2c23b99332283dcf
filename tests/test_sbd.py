import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io
from sbd_files import sbd_bytes
from voc_folder import SIZES, rectangle_mask, write_list, write_voc_folder

from toco_core.commands.check import check_command as main
from toco_core.data import VOC_CLASSES, VOCFolder, check, open_source, split_names
from toco_core.data.layouts.sbd import read_sbd_mask
from toco_core.data.survey import inventory
from toco_core.errors import ToCoError
from toco_core.machine.intake import limit


def some_mask(height=13, width=29, seed=0):
    return np.random.default_rng(seed).integers(0, 21, (height, width), dtype=np.uint8)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.float64, np.int32])
def test_a_mask_is_read_as_scipy_reads_it(tmp_path, compressed, kind):
    mask, path = some_mask().astype(kind), tmp_path / "a.mat"
    path.write_bytes(sbd_bytes(mask, compressed=compressed))
    theirs = scipy.io.loadmat(path)["GTcls"][0, 0]["Segmentation"]
    found = read_sbd_mask(path)
    assert found.dtype == np.uint8 and found.flags.writeable
    np.testing.assert_array_equal(found, theirs)
    np.testing.assert_array_equal(found, mask)


def test_other_variables_and_other_byte_order(tmp_path):
    """What stands before GTcls is passed over; files of big-endian machines are read, too."""
    file = io.BytesIO()
    gt = np.zeros((1, 1), dtype=[("Segmentation", object)])
    gt[0, 0]["Segmentation"] = some_mask(2, 3)
    scipy.io.savemat(file, {"first": np.eye(3), "text": "words", "GTcls": gt})
    (tmp_path / "a.mat").write_bytes(file.getvalue())
    np.testing.assert_array_equal(read_sbd_mask(tmp_path / "a.mat"), some_mask(2, 3))

    def element(kind, content):
        return struct.pack(">II", kind, len(content)) + content + b"\0" * (-len(content) % 8)

    def matrix(kind, shape, name, *parts):
        flags, dims = struct.pack(">II", kind, 0), struct.pack(">ii", *shape)
        return element(14, element(6, flags) + element(5, dims) + element(1, name) + b"".join(parts))

    mask = some_mask(5, 7)
    values = matrix(9, mask.shape, b"", element(2, mask.tobytes(order="F")))
    names = struct.pack(">HHi", 4, 5, 32) + element(1, b"Segmentation".ljust(32, b"\0"))
    data = matrix(2, (1, 1), b"GTcls", names, values)
    (tmp_path / "b.mat").write_bytes(b"MATLAB 5.0".ljust(124) + struct.pack(">H", 256) + b"MI" + data)
    np.testing.assert_array_equal(read_sbd_mask(tmp_path / "b.mat"), mask)
    np.testing.assert_array_equal(scipy.io.loadmat(tmp_path / "b.mat")["GTcls"][0, 0]["Segmentation"], mask)


def packed(content: bytes) -> bytes:
    content = zlib.compress(content)
    return b"MATLAB 5.0".ljust(124) + struct.pack("<H", 256) + b"IM" + struct.pack("<II", 15, len(content)) + content


def saved(**variables) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it does not begin as MATLAB's"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "it does not begin as MATLAB's"),
        (sbd_bytes(some_mask())[:-20], "truncated"),
        (sbd_bytes(some_mask(), compressed=False)[:-200], "truncated"),
        (saved(GTinst={"Segmentation": some_mask()}), "no such entry"),
        (saved(GTcls={"Boundaries": some_mask()}), "no such entry"),
        (saved(GTcls=some_mask()), "no such entry"),
        (saved(GTcls={"Segmentation": "words"}), "no matrix of numbers"),
        (saved(GTcls={"Segmentation": np.ones((2, 3, 4))}), "no matrix of numbers"),
        (saved(GTcls={"Segmentation": np.full((2, 3), 0.5)}), "values beyond 0..255"),
        (saved(GTcls={"Segmentation": np.full((2, 3), 256)}), "values beyond 0..255"),
        (saved(GTcls={"Segmentation": np.ones((0, 3))}), "values beyond 0..255"),
        (packed(bytes(limit("mat_bytes") + 1)), "larger than"),
        (packed(b""), "no such entry"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(ToCoError, match=rf"a\.mat .*{message}"):
        read_sbd_mask(tmp_path / "a.mat")


def test_cells_within_cells_do_not_end_the_process(tmp_path):
    """100,000 of them, which overflow the stack of a reader that follows them."""
    head = struct.pack("<IIII", 6, 8, 1, 0) + struct.pack("<IIii", 5, 8, 1, 1) + struct.pack("<II", 1, 0)
    parts, size = [], 0
    for _ in range(100_000):
        size += len(head)
        parts.append(struct.pack("<II", 14, size) + head)
        size += 8
    (tmp_path / "a.mat").write_bytes(packed(b"".join(reversed(parts))))
    with pytest.raises(ToCoError, match="no such entry"):
        read_sbd_mask(tmp_path / "a.mat")
    with pytest.raises(ToCoError, match="nowhere.mat cannot be read"):
        read_sbd_mask(tmp_path / "nowhere.mat")


# ---- in a VOC folder


@pytest.fixture
def root(tmp_path):
    """VOC has masks of images 0 (train) and 1 (val), SBD of all but image 4; image 9 of SBD is none of VOC's."""
    root = write_voc_folder(tmp_path / "VOCdevkit" / "VOC2012", n=5, splits={"train": [0], "val": [1]}, classes=None)
    for i in (2, 3, 4):
        (root / "SegmentationClass" / f"img_{i}.png").unlink()
    folder = tmp_path / "benchmark_RELEASE" / "dataset" / "cls"
    folder.mkdir(parents=True)
    for i in (0, 1, 2, 3, 9):
        (folder / f"img_{i}.mat").write_bytes(sbd_bytes(rectangle_mask(*SIZES[i % 4], 4 + i)))
    return root


def test_train_aug_from_voc_and_sbd(root):
    assert split_names(root) == ("train", "train_aug", "val")
    source = open_source(root, "train_aug")
    assert source.names == ("img_0", "img_2", "img_3") and source.class_names == VOC_CLASSES
    np.testing.assert_array_equal(source.mask(0), rectangle_mask(*SIZES[0], 1))  # VOC's own
    np.testing.assert_array_equal(source.mask(2), rectangle_mask(*SIZES[3], 7))
    assert [np.flatnonzero(row).tolist() for row in source.image_labels] == [[0], [5], [6]]
    report = check(root, "train_aug", progress=False)
    assert (report.n_images, report.n_masks) == (3, 3)
    np.testing.assert_array_equal(open_source(root, "train").mask(0), source.mask(0))


def test_the_places_of_sbd(root, tmp_path):
    for place in ("VOCdevkit/SBD", "VOCdevkit/VOC2012/benchmark_RELEASE/dataset"):
        moved = tmp_path / place / "cls"
        moved.parent.mkdir(parents=True)
        next(tmp_path.rglob("cls")).rename(moved)
        assert VOCFolder(root, "train_aug").names == ("img_0", "img_2", "img_3")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(ToCoError, match="split 'train_aug' is not in"):
        VOCFolder(root, "train_aug")


def test_sbd_beside_another_data_set_is_left_alone(root):
    other = write_voc_folder(root.parent / "VOC2007", n=3, splits={"train": [0], "val": [1]})
    for path in list((other / "JPEGImages").iterdir()):
        path.rename(path.with_stem(path.stem.replace("img_", "00")))
    assert split_names(other) == ("train", "val")


def test_a_list_in_two_columns_needs_no_conversion_either(root):
    write_list(root, "train_aug", [f"/JPEGImages/img_{i}.jpg /SegmentationClassAug/img_{i}.png" for i in (3, 2)])
    source = VOCFolder(root, "train_aug")
    assert source.names == ("img_3", "img_2") and source.mask(0)[6, 8] == 7
    write_list(root, "short_aug", ["img_2", "img_4"])
    with pytest.raises(ToCoError, match="img_4.jpg has no mask"):
        VOCFolder(root, "short_aug")


def test_masks_in_segmentation_class_aug_come_first(root):
    (root / "SegmentationClassAug").mkdir()
    with pytest.raises(ToCoError, match="train_aug is empty"):
        VOCFolder(root, "train_aug")


def test_what_is_missing_is_told(root, capsys):
    found = inventory(root)
    counts = {e.what: (e.found, e.expected) for e in found.entries}
    assert counts["SBD cls/*.mat"] == (5, 11355) and "SegmentationClassAug/" not in counts
    assert counts["ImageSets/Segmentation/train_aug.txt"] == (3, 10582)
    assert "get: SBD, benchmark.tgz from" in str(found)
    assert main([str(root)]) == 0 and "train_aug: 3 images, 3 masks" in capsys.readouterr().out
    damaged = next(root.parents[1].rglob("img_3.mat"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert main([str(root), "--split", "train_aug"]) == 1 and "img_3.mat" in capsys.readouterr().out
