import json
import time

import numpy as np
import pytest
from coco_folder import (
    SIZES,
    annotation,
    read_json,
    rectangle,
    run_lengths,
    write_coco_folder,
    write_images,
    write_json,
)
from growth import memory_growth
from PIL import Image
from pycocotools import mask as rle

from toco_core.data import COCOFolder, open_source, open_train_val, split_names
from toco_core.data.layouts import coco
from toco_core.data.layouts.coco import _counts, _runs
from toco_core.errors import ToCoError


@pytest.fixture
def root(tmp_path):
    return write_coco_folder(tmp_path / "coco")


def expected_mask(i):
    mask = np.zeros(SIZES[i % 3], np.uint8)
    mask[2:12, 3:15] = 2
    mask[6:9, 7:11] = 1
    if i == 2:
        mask[13:15, 4:17] = 3
    return mask


def test_a_folder_is_read_as_it_was_written(root):
    folder = COCOFolder(root, "train")
    assert folder.class_names == ("background", "cat", "dog", "sheep")  # by category id, not by place or name
    assert folder.names == tuple(f"COCO_train2014_{i:012d}" for i in (0, 1, 2, 4)) and folder.n_unlabelled == 1
    assert folder.image_labels.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]]
    for index, i in enumerate((0, 1, 2, 4)):
        assert folder.image(index).shape == (*SIZES[i % 3], 3)
        np.testing.assert_array_equal(folder.mask(index), expected_mask(i))
    report = folder.check()
    assert (report.n_images, report.n_masks, report.images_per_class.tolist()) == (4, 4, [4, 4, 1])


def test_images_without_annotation_can_be_kept(root):
    folder = COCOFolder(root, "train", unlabelled=True)
    assert len(folder) == 5 and folder.image_labels[3].tolist() == [0, 0, 0] and not folder.mask(3).any()


def test_subset_keeps_items_together(root):
    whole = COCOFolder(root, "train")
    part = whole.subset([2, 0])
    assert part.names == (whole.names[2], whole.names[0])
    np.testing.assert_array_equal(part.mask(0), whole.mask(2))
    np.testing.assert_array_equal(part.image_labels, whole.image_labels[[2, 0]])


def test_splits_and_lists(root):
    assert split_names(root) == ("train", "val", "val_part")
    names = COCOFolder(root, "val").names
    part = COCOFolder(root, "val_part").names
    assert 0 < len(part) < len(names) and set(part) < set(names)
    (root / "val_part.txt").write_text(f"{names[2]}\nval2014/{names[0]}.jpg\n")
    listed = COCOFolder(root, "val_part")
    assert set(listed.names) == {names[0], names[2]} and len(listed.image_labels) == 2
    (root / "mine.txt").write_text(f"{names[2]}\nnowhere\n")
    with pytest.raises(ToCoError, match="mine.txt names images that no one of instances_train2014.json"):
        COCOFolder(root, "mine")
    with pytest.raises(ToCoError, match="split 'test' is not in .*: there is mine, train, val, val_part"):
        COCOFolder(root, "test")


def test_a_name_may_end_like_a_file(root):
    """`a.jpg` is the name of the file `a.jpg.png`, in a list as in a split."""
    content = read_json(root, "train")
    before = content["images"][2]["file_name"]
    (root / "train2014" / before).rename(root / "train2014" / "a.jpg.png")
    content["images"][2]["file_name"] = "a.jpg.png"
    write_json(root, "train", content)
    for line in ("a.jpg", "a.jpg.png", "train2014/a.jpg.png"):
        (root / "mine.txt").write_text(f"{line}\n")
        assert COCOFolder(root, "mine").names == ("a.jpg",)


def test_train_and_val_are_opened_together(root):
    pair = open_train_val(root)
    assert (len(pair.train), len(pair.val), pair.held_out) == (4, 3, False)
    content = read_json(root, "val")
    content["categories"] = content["categories"][:2]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 90]
    write_json(root, "val", content)
    with pytest.raises(ToCoError, match="train has the classes cat, dog, sheep but val has cat, dog"):
        open_train_val(root)


def test_images_may_lie_in_a_folder_of_vocs_name(root):
    before = COCOFolder(root, "train").names
    (root / "train2014").rename(root / "JPEGImages")
    (root / "val2014").rename(root / "others")
    assert open_source(root, "train").names == before


def test_one_annotation_file_with_images_beside_it(tmp_path):
    root = write_images(tmp_path / "data", [f"images/sub/{i}.png" for i in range(6)])
    images = [
        {"id": i, "file_name": f"sub/{i}.png", "height": SIZES[i % 3][0], "width": SIZES[i % 3][1]} for i in range(6)
    ]
    annotations = [{"id": i, "image_id": i, "category_id": 7 + i % 2} for i in range(6)]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}]
    (root / "mine.json").write_text(json.dumps(content))
    pair = open_train_val(root / "mine.json", fraction=0.4)
    assert pair.held_out and len(pair.train) + len(pair.val) == 6
    assert pair.train.mask(0) is None and pair.train.n_masks == 0  # no segmentation in the file
    whole = COCOFolder(root / "mine.json")
    assert whole.names[1] == "sub/1" and whole.image_labels.tolist() == [[1, 0], [0, 1]] * 3
    assert whole.check().n_masks == 0
    with pytest.raises(ToCoError, match="one annotation file is one split, 'train'"):
        COCOFolder(root / "mine.json", "val")


def test_an_image_with_a_box_alone_has_no_mask(root):
    """Its mask was all background beside others with polygons, and it was scored by it."""

    def without_shapes(content):
        for entry in content["annotations"]:
            if entry["image_id"] == 100 or entry["id"] == 11:
                entry |= {"bbox": [3, 2, 12, 10], "segmentation": []}
        content["annotations"].append({"id": 99, "image_id": 102, "category_id": 1, "bbox": [1, 1, 3, 3]})

    spoil(root, without_shapes)
    folder = COCOFolder(root, "train", unlabelled=True)
    assert [folder.mask(i) is None for i in range(5)] == [True, True, True, False, False] and folder.n_masks == 2
    assert not folder.mask(3).any() and folder.image_labels[:3].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(folder.mask(4), expected_mask(4))
    assert folder.check().n_masks == 2


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_equal_those_of_pycocotools(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    H, W = int(rng.integers(1, 40)), int(rng.integers(1, 50))
    mask = rng.random((H, W)) < rng.choice([0.02, 0.5, 0.97])
    mask[: H // 2] = mask[:1]  # long runs, too
    packed = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = packed["counts"].decode()
    plain = run_lengths(mask)
    assert _counts(text.encode()).tolist() == plain["counts"]
    for shape in (plain, {"size": [H, W], "counts": text}):
        for few, long in ((4096, 64), (0, 10**6)):
            monkeypatch.setattr(coco, "FEW_RUNS", few)
            monkeypatch.setattr(coco, "LONG_RUN", long)
            painted = np.zeros(H * W, np.uint8)
            runs = _runs(shape, H, W, "here")
            runs.paint(painted, 7)
            np.testing.assert_array_equal(painted.reshape(W, H).T, 7 * mask)
            assert runs.area == mask.sum()


def test_ignored_pixels(root):
    content = read_json(root)
    void = np.zeros(SIZES[0], bool)
    void[5:9, 2:5] = True
    content["images"][0]["ignore"] = run_lengths(void)
    write_json(root, "train", content)
    mask = COCOFolder(root, "train").mask(0)
    assert (mask[void] == 255).all() and (mask[~void] == expected_mask(0)[~void]).all()


def spoil(root, change):
    content = read_json(root)
    change(content)
    write_json(root, "train", content)


@pytest.mark.parametrize(
    "entry", ["../../secret.jpg", "/etc/passwd.jpg", "a/../../b.jpg", "C:\\a.jpg", "..\\a.jpg", "a\0b.jpg", "C:/a.jpg"]
)
def test_paths_that_lead_out_of_the_folder_are_refused(root, entry):
    spoil(root, lambda c: c["images"][1].update(file_name=entry))
    with pytest.raises(ToCoError, match="image 101: .* is not a name inside the image folder; absolute paths and"):
        COCOFolder(root, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: c.update(annotations={}), "has no list 'annotations'"),
        (lambda c: c["images"].append(3), "an entry of 'images' is no object"),
        (lambda c: c["images"][0].pop("file_name"), "image 100 has file_name = None: a text is wanted"),
        (lambda c: c["images"][0].update(file_name="a.svg"), "image 100 has file_name = 'a.svg': allowed are .jpg"),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), "gone.jpg, named in .*, is in none of the folders"),
        (lambda c: c["images"][1].update(file_name="gone.jpg"), "gone.jpg, named in .*, does not exist"),
        (lambda c: c["images"][0].update(height=-3), "image 100 is -3 x 30: allowed are 1 to"),
        (lambda c: c["images"][0].update(width=10**9), "image 100 is 20 x 1000000000: allowed are 1 to"),
        (lambda c: c["images"][0].update(width="30"), "image 100 has width = '30': a whole number is wanted"),
        (lambda c: c["images"][1].update(id=100), "the image id 100 more than once"),
        (lambda c: c["annotations"][0].update(category_id=2), "annotation 1 has category_id = 2, which no category"),
        (lambda c: c["annotations"][0].update(image_id=7), "annotation 1 has image_id = 7, which no image has"),
        (lambda c: c["annotations"][0].update(segmentation="x" * 200), "annotation 1: a segmentation is a list"),
        (lambda c: c.update(categories=[]), "names 0 classes"),
        (lambda c: c["categories"].append({"id": 3, "name": "cow"}), "the category id '3' more than once"),
        (lambda c: c["categories"].append({"id": 4, "name": " "}), "category 4 has the name ' '"),
        (
            lambda c: c["categories"].append({"id": 0, "name": "_Background_"}),
            "a category '_Background_': background is",
        ),
        (lambda c: c["categories"].append({"id": 5, "name": "dog"}), "the class 'dog' more than once"),
        (lambda c: c.update(annotations=[]), "split 'train' is empty: .* names no image with a label"),
    ],
)
def test_opening_names_what_is_wrong(root, change, message):
    spoil(root, change)
    with pytest.raises(ToCoError, match=message) as caught:
        COCOFolder(root, "train")
    assert "instances_train2014.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"\xff\xfe", b"[" * 100000, b'"text"'])
def test_files_that_are_no_json(root, content):
    (root / "annotations" / "instances_train2014.json").write_bytes(content)
    with pytest.raises(ToCoError, match="instances_train2014.json (is not valid JSON|has no list 'images')"):
        COCOFolder(root, "train")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([[1, 2, 3, 4]], "a polygon of 4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "leads far out"),
        ([[1, 2, 3, 4, 5, 1e12]], "leads far out"),
        ({"size": [20, 30], "counts": [5, 5]}, "do not add up to 20 x 30"),
        ({"size": [20, 30], "counts": [700, -100]}, "do not add up to 20 x 30"),
        ({"size": [20, 30], "counts": "00"}, "do not add up to 20 x 30"),
        ({"size": [20, 30], "counts": "zzz"}, "do not add up to 20 x 30"),
        ({"size": [20, 30]}, "do not add up to 20 x 30"),
        ({"size": [30, 20], "counts": [600]}, r"an RLE of size \[30, 20\] in an image of 20 x 30"),
    ],
)
def test_shapes_that_cannot_be_drawn_are_named(root, shape, message):
    spoil(root, lambda c: c["annotations"][0].update(segmentation=shape))
    folder = COCOFolder(root, "train")
    with pytest.raises(ToCoError, match=f"instances_train2014.json .image COCO_train2014_000000000000.: .*{message}"):
        folder.mask(0)
    with pytest.raises(ToCoError, match=message):
        folder.check()


def test_a_size_that_differs_from_the_file_is_named(root):
    spoil(root, lambda c: c["images"][0].update(height=21))
    with pytest.raises(ToCoError, match="is 21 x 30 but its image COCO_train2014_000000000000.jpg is 20 x 30"):
        COCOFolder(root, "train").check()


def test_several_polygons_and_a_border_outside_the_image(root):
    def two_parts(content):
        shape = [*rectangle(0, 0, 3, 4), *rectangle(10, 20, 25, 40)]
        content["annotations"] = [annotation(1, 100, 3, shape)]

    spoil(root, two_parts)
    mask = COCOFolder(root, "train").mask(0)
    wanted = np.zeros(SIZES[0], np.uint8)
    wanted[:3, :4] = wanted[10:, 20:] = 2
    assert (mask != wanted).mean() < 0.03  # the border outside is cut by pycocotools, to a pixel
    assert mask[1, 1] == mask[15, 25] == 2 and mask[8, 10] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=[1]), r"category_id = \[1\], which no category has"),
        (lambda c: c["annotations"][0].update(category_id={}), r"category_id = \{\}, which no category has"),
        (lambda c: c["annotations"][0].update(category_id=True), "category_id = True, which no category has"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"image_id = \[1\], which no image has"),
        (lambda c: c["annotations"][0].update(segmentation=[[10**400, 1, 2, 3, 4, 5]]), "list of polygons or an RLE"),
        (
            lambda c: c["images"][0].update(height=1, width=2**27),
            "is 1 x 134217728: allowed .* at most 65500 a side",
        ),
        (lambda c: c["categories"][0].update(name="\ud800"), "is no text in UTF-8"),
        (lambda c: c["images"][0].update(file_name="\ud800.jpg"), "is no text in UTF-8"),
    ],
)
def test_what_is_no_number_or_name(root, change, message):
    """Each ended in a raw error: TypeError, OverflowError, UnicodeEncodeError."""
    spoil(root, change)
    with pytest.raises(ToCoError, match=f"instances_train2014.json.*{message}"):
        COCOFolder(root, "train")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"size": 5, "counts": [600]}, "an RLE of size 5 in an image of 20 x 30"),
        ({"size": None, "counts": [600]}, "an RLE of size None"),
        ({"size": [20, 30], "counts": "\ud800"}, "do not add up to 20 x 30"),
        ({"size": [20, 30], "counts": [10**400]}, "do not add up to 20 x 30"),
        ({"size": [20, 30], "counts": [True, 599]}, "do not add up to 20 x 30"),
        ({"size": [20, 30], "counts": "o" * 2_000_000}, "do not add up to 20 x 30"),
        ({"size": [20, 30], "counts": "o" * 10_000_000}, "10000048 pixels of outlines: at most 8388608 are read"),
        ([[0, 0, 30, 20] * 500_000], "pixels of outlines: at most 8388608 are read"),
    ],
)
def test_hostile_shapes_are_refused_at_once(root, shape, message):
    """Two megabytes of an RLE's characters took more than 45 seconds, a long outline gigabytes in C."""
    spoil(root, lambda c: c["annotations"][0].update(segmentation=shape))
    began = time.process_time()
    with pytest.raises(ToCoError, match=message):
        COCOFolder(root, "train").mask(0)
    assert time.process_time() - began < 5


def test_nothing_is_drawn_for_a_declared_size_that_the_image_has_not(root):
    """A photograph of a kilobyte said to be 11585 x 11585: 200 objects on it asked for 26 GB."""
    objects = [annotation(i, 100, 3, rectangle(0, 0, 11585, 11585)) for i in range(200)]

    def lie(content):
        content["images"][0].update(height=11585, width=11585)
        content["annotations"] = objects

    spoil(root, lie)
    growth = memory_growth()
    with pytest.raises(ToCoError, match="is 11585 x 11585 but its image COCO_train2014_000000000000.jpg is 20 x 30"):
        COCOFolder(root, "train").mask(0)
    assert growth() < 100


def test_many_objects_on_a_large_image_share_one_mask(root):
    """24 megapixels with 60 small objects took 15 seconds and a gigabyte."""
    H, W = 6000, 4000
    Image.new("L", (W, H)).save(root / "train2014" / "COCO_train2014_000000000000.jpg")

    def many(content):
        content["images"][0].update(height=H, width=W)
        content["annotations"] = [
            annotation(i, 100, 3, rectangle(50 * i, 60 * i, 50 * i + 40, 60 * i + 30)) for i in range(60)
        ]
        content["annotations"].append(annotation(99, 100, 1, rectangle(0, 0, 6000, 4000)))

    spoil(root, many)
    folder, growth, began = COCOFolder(root, "train"), memory_growth(), time.process_time()
    mask = folder.mask(0)
    assert time.process_time() - began < 5 and growth() < 200
    assert (mask == 2).sum() == 60 * 40 * 30 and mask[20, 15] == 2 and mask[41, 15] == 1 and mask[-1, -1] == 1


def test_the_area_of_all_objects_has_a_limit(root, monkeypatch):
    monkeypatch.setenv("TOCO_LIMITS", "painted_pixels=100")
    with pytest.raises(ToCoError, match="pixels of objects: at most 100 are read .to raise this limit: TOCO_LIMITS=pa"):
        COCOFolder(root, "train").mask(0)
