import pickle

import numpy as np
import pytest
from PIL import Image
from voc_folder import CLASSES, SIZES, rectangle_mask, save_palette_mask, smooth_image, write_list, write_voc_folder

from toco_core.data import VOC_CLASSES, VOCFolder, check, holdout, open_source, open_train_val, split_names
from toco_core.errors import ToCoError


@pytest.fixture
def root(tmp_path):
    return write_voc_folder(tmp_path / "data")


def test_a_folder_is_read_as_it_was_written(root):
    folder = VOCFolder(root, "train")
    assert folder.names == tuple(f"img_{i}" for i in range(6)) and len(folder) == 6
    assert folder.class_names == CLASSES and folder.n_classes == 3
    for i in range(6):
        height, width = SIZES[i % 4]
        np.testing.assert_array_equal(folder.mask(i), rectangle_mask(height, width, 1 + i % 3))
        assert np.abs(folder.image(i).astype(int) - smooth_image(height, width, i)).mean() < 5
    np.testing.assert_array_equal(folder.image_labels, np.eye(3, dtype=np.uint8)[[0, 1, 2, 0, 1, 2]])


def test_check_reports_what_is_there(root):
    report = check(root, "train")
    assert (report.n_images, report.n_masks, report.n_without_class) == (6, 6, 0)
    assert report.images_per_class.tolist() == [2, 2, 2]
    assert (report.smallest, report.largest) == ((16, 16), (25, 40))
    masks = [VOCFolder(root, "train").mask(i) for i in range(6)]
    void = sum((mask == 255).sum() for mask in masks) / sum(mask.size for mask in masks)
    assert report.void_share == pytest.approx(void)
    assert "6 images of 16 x 16 to 25 x 40" in str(report) and "cat 2, dog 2, sheep 2" in str(report)


def test_splits_are_listed(root):
    write_list(root, "val", ["img_0"])
    assert split_names(root) == ("train", "val")


@pytest.mark.parametrize(
    "lines, source",
    [
        (["background", "a", "b", "c"], "with background"),
        (["a", "b", "c"], "without"),
        (["", " a ", "b", "", "c"], "blank lines"),
        (["_background_", "a", "b", "c"], "the release's name"),
    ],
)
def test_classes_from_classes_txt(root, lines, source):
    (root / "classes.txt").write_text("\n".join(lines))
    assert VOCFolder(root, "train").class_names == ("background", "a", "b", "c")


def test_classes_from_the_masks_are_those_of_the_whole_folder(root):
    (root / "classes.txt").unlink()
    write_list(root, "small", ["img_0"])
    folder = VOCFolder(root, "small")
    assert folder.class_names == ("background", "class 1", "class 2", "class 3")
    assert folder.class_source == "the values in the masks"


def test_voc_has_its_twenty_classes(tmp_path):
    root = write_voc_folder(tmp_path / "VOC2012", classes=None)
    folder = VOCFolder(root, "train")
    assert folder.class_names == VOC_CLASSES and len(VOC_CLASSES) == 21
    moved = root.rename(tmp_path / "elsewhere")
    for file in (moved / "JPEGImages" / "img_0.jpg", moved / "SegmentationClass" / "img_0.png"):
        file.rename(file.with_stem("2007_000032"))
    write_list(moved, "train", ["2007_000032"])
    assert VOCFolder(moved, "train").class_names == VOC_CLASSES


def test_an_image_is_found_by_its_name_or_its_number(root):
    folder = VOCFolder(root, "train")
    assert [folder.index_of(text) for text in (folder.names[1], "1", "0")] == [1, 1, 0]
    for text in ("img_99", str(len(folder)), "-1", "\u00b2", ""):
        words = rf"image = '{text}' is not in \w+ \[train\]: give a name or a number 0..{len(folder) - 1}"
        with pytest.raises(ToCoError, match=words):
            folder.index_of(text)


def test_classes_can_be_given(root):
    assert VOCFolder(root, "train", class_names=["x", "y", "z", "w"]).n_classes == 4


def test_train_aug_in_two_columns_names_its_masks(root):
    (root / "SegmentationClassAug").mkdir()
    save_palette_mask(rectangle_mask(20, 30, 3), root / "SegmentationClassAug" / "img_0.png")
    write_list(root, "train_aug", ["/JPEGImages/img_0.jpg /SegmentationClassAug/img_0.png"])
    folder = VOCFolder(root, "train_aug")
    assert folder.names == ("img_0",) and folder.image_labels.tolist() == [[0, 0, 1]]
    write_list(root, "short_aug", ["img_0"])  # one column: the name of the split tells
    assert VOCFolder(root, "short_aug").image_labels.tolist() == [[0, 0, 1]]


def test_train_aug_without_a_list_is_every_augmented_mask_outside_val(root):
    with pytest.raises(ToCoError, match="split 'train_aug' is not in"):
        VOCFolder(root, "train_aug")
    (root / "SegmentationClassAug").mkdir()
    write_list(root, "val", ["img_1"])
    for i in (4, 1, 3):
        save_palette_mask(rectangle_mask(*SIZES[i % 4], 3), root / "SegmentationClassAug" / f"img_{i}.png")
    assert split_names(root) == ("train", "train_aug", "val")
    folder = VOCFolder(root, "train_aug")
    assert folder.names == ("img_3", "img_4") and folder.image_labels.tolist() == [[0, 0, 1], [0, 0, 1]]
    write_list(root, "train_aug", ["img_1"])
    assert VOCFolder(root, "train_aug").names == ("img_1",)  # a list, where there is one, is what counts


def test_a_folder_without_masks_takes_its_labels_from_annotations(root):
    for i in range(6):
        write_annotation(root, f"img_{i}", ["dog"])
        (root / "SegmentationClass" / f"img_{i}.png").unlink()
    source = open_source(root)
    assert source.n_masks == 0 and source.label_source == "xml" and source.image_labels.tolist() == [[0, 1, 0]] * 6
    with pytest.raises(ToCoError, match="img_0.jpg has no mask"):
        open_source(root, require_masks=True)


def test_lists_with_flags_suffixes_and_spaces(root):
    for file in (root / "JPEGImages" / "img_2.jpg", root / "SegmentationClass" / "img_2.png"):
        file.rename(file.with_stem("my photo 2"))
    write_list(root, "mixed", ["img_0  1", "img_1 -1", "my photo 2", "", "img_3.jpg"])
    assert VOCFolder(root, "mixed").names == ("img_0", "img_1", "my photo 2", "img_3")


def test_a_suffix_that_belongs_to_a_name_stays(root):
    for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
        (root / folder / f"img_2{suffix}").rename(root / folder / f"img_1.png{suffix}")
    write_list(root, "mixed", ["img_1.png", "img_1", "/JPEGImages/img_3.jpg /SegmentationClass/img_3.png"])
    source = VOCFolder(root, "mixed")
    assert source.names == ("img_1.png", "img_1", "img_3")
    assert [source.image(i).shape[:2] for i in range(3)] == [SIZES[2], SIZES[1], SIZES[3]]
    assert source.check(progress=False).n_masks == 3


def test_unicode_names_in_either_composition(root):
    for file in (root / "JPEGImages" / "img_0.jpg", root / "SegmentationClass" / "img_0.png"):
        file.rename(file.with_stem("caf\u00e9"))
    write_list(root, "train", ["cafe\u0301"])
    assert VOCFolder(root, "train").image(0).shape == (20, 30, 3)


def test_labels_from_annotations(root):
    write_annotation(root, "img_0", ["dog", "sheep", "dog"])
    write_annotation(root, "img_1", [])
    write_list(root, "train", ["img_0", "img_1"])
    assert VOCFolder(root, "train", labels="xml").image_labels.tolist() == [[0, 1, 1], [0, 0, 0]]
    (root / "SegmentationClass" / "img_1.png").unlink()
    folder = VOCFolder(root, "train", require_masks=False)  # no longer from masks
    assert folder.label_source == "xml" and folder.image_labels[0].tolist() == [0, 1, 1]
    report = folder.check()
    assert (report.n_masks, report.n_without_class) == (1, 1)


def test_labels_from_a_mapping_by_numbers_or_by_names(root):
    write_list(root, "train", ["img_0", "img_1"])
    by_name = {"img_0": ["sheep", "cat"], "img_1": []}
    by_number = {"img_0": np.array([1, 0, 1]), "img_1": [0, 0, 0], "other": [9]}
    for labels in (by_name, by_number):
        assert VOCFolder(root, "train", labels=labels).image_labels.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_labels_from_npy_files(root, tmp_path):
    write_list(root, "train", ["img_1", "img_0"])
    mapping = {"img_0": np.array([1, 0, 1], np.uint8), "img_1": np.array([0, 1, 0], np.uint8)}
    np.save(tmp_path / "mapping.npy", mapping)  # as the field passes labels around: pickled
    np.save(tmp_path / "rows.npy", np.stack([mapping["img_1"], mapping["img_0"]]))
    for path in (tmp_path / "mapping.npy", str(tmp_path / "rows.npy")):
        assert VOCFolder(root, "train", labels=path).image_labels.tolist() == [[0, 1, 0], [1, 0, 1]]


def test_an_npy_file_runs_no_code(root, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.npy"
    np.save(path, np.array({"img_0": Evil()}, dtype=object), allow_pickle=True)
    with pytest.raises(ToCoError, match="refused: it would load .*open"):
        VOCFolder(root, "train", labels=path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00", pickle.dumps({})])
def test_other_files_are_no_labels(root, tmp_path, content):
    (tmp_path / "labels.npy").write_bytes(content)
    with pytest.raises(ToCoError, match="labels.npy is not a NumPy file"):
        VOCFolder(root, "train", labels=tmp_path / "labels.npy")


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"img_0": [1, 0, 0]}, "labels has no image labels for 'img_1'"),
        ({f"img_{i}": [1, 0] for i in range(6)}, "labels for 'img_0' is .*a row of 3 numbers"),
        ({f"img_{i}": [1, 0, 2] for i in range(6)}, "labels for 'img_0' is .*a row of 3 numbers"),
        (
            {f"img_{i}": ["cow"] for i in range(6)},
            "labels for 'img_0' names the class 'cow': known are cat, dog, sheep",
        ),
        ("nowhere.npy", "nowhere.npy cannot be read"),
    ],
)
def test_labels_that_do_not_fit_are_refused(root, labels, message):
    with pytest.raises(ToCoError, match=message):
        VOCFolder(root, "train", labels=labels)


def test_subset_keeps_items_together(root):
    whole = VOCFolder(root, "train")
    for derived_before in (False, True):
        if derived_before:
            whole.image_labels  # noqa: B018
        part = whole.subset([4, 0])
        assert part.names == ("img_4", "img_0") and len(whole) == 6
        np.testing.assert_array_equal(part.image_labels, whole.image_labels[[4, 0]])
        np.testing.assert_array_equal(part.mask(0), whole.mask(4))
        np.testing.assert_array_equal(part.image(1), whole.image(0))
    with pytest.raises(ToCoError, match="has no items"):
        whole.subset([])


def test_holdout_cuts_by_the_name_alone():
    names = [f"photo {i}" for i in range(500)]
    kept, out = holdout(names, 0.2, seed=3)
    assert sorted(kept + out) == list(range(500)) and 70 <= len(out) <= 130
    held = {names[i] for i in out}
    backwards = names[::-1]
    assert {backwards[i] for i in holdout(backwards, 0.2, seed=3)[1]} == held
    more = names + [f"new {i}" for i in range(300)]
    assert {more[i] for i in holdout(more, 0.2, seed=3)[1]} & set(names) == held
    assert set(holdout(names, 0.2, seed=4)[1]) != set(out)
    assert set(out) <= set(holdout(names, 0.4, seed=3)[1])


def test_holdout_is_the_same_on_every_machine():
    assert holdout([f"img_{i}" for i in range(12)], 0.25, seed=0)[1] == [0, 3, 5]


def test_holdout_leaves_neither_side_empty():
    for seed in range(20):
        for fraction in (0.01, 0.99):
            kept, out = holdout(["a", "b", "c"], fraction, seed)
            assert kept and out
    with pytest.raises(ToCoError, match="fraction = 1.0"):
        holdout(["a", "b"], 1.0)
    with pytest.raises(ToCoError, match="1 names"):
        holdout(["a"], 0.5)


def test_open_train_val_uses_the_list_or_holds_out(root):
    pair = open_train_val(root, fraction=0.4, seed=1)
    assert pair.held_out and set(pair.train.names) | set(pair.val.names) == {f"img_{i}" for i in range(6)}
    assert not set(pair.train.names) & set(pair.val.names)
    write_list(root, "val", ["img_5"])
    pair = open_train_val(root)
    assert not pair.held_out and pair.val.names == ("img_5",) and len(pair.train) == 6


# Bad folders. Each: what is done to the folder, and the message.


def truncate_image(root):
    path = root / "JPEGImages" / "img_4.jpg"
    path.write_bytes(path.read_bytes()[:-300])


def wrong_value(root):
    mask = rectangle_mask(*SIZES[2], 1)
    mask[8, 8] = 4
    save_palette_mask(mask, root / "SegmentationClass" / "img_2.png")


def wrong_size(root):
    save_palette_mask(rectangle_mask(30, 20, 1), root / "SegmentationClass" / "img_0.png")


def colour_mask(root):
    Image.fromarray(smooth_image(20, 30, 0)).save(root / "SegmentationClass" / "img_0.png")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncate_image, "img_4.jpg is truncated"),
        (wrong_value, r"img_2.png holds the value 4: allowed are 0..3 \(3 classes from classes.txt\) and 255 = ignore"),
        (wrong_size, "img_0.png is 30 x 20 but its image img_0.jpg is 20 x 30"),
        (colour_mask, "img_0.png is a colour image"),
    ],
)
def test_check_names_the_bad_file(root, spoil, message):
    spoil(root)
    VOCFolder(root, "train")  # opening looks at names only
    with pytest.raises(ToCoError, match=message) as caught:
        check(root, "train")
    assert "\n" not in str(caught.value)


def test_deriving_labels_refuses_wrong_values_too(root):
    wrong_value(root)
    with pytest.raises(ToCoError, match="img_2.png holds the value 4"):
        VOCFolder(root, "train").image_labels  # noqa: B018


def test_check_counts_further_bad_files(root):
    truncate_image(root)
    wrong_value(root)
    with pytest.raises(ToCoError, match=r"img_2.png .*\(1 more of 6 files have problems\)"):
        check(root, "train")


@pytest.mark.parametrize(
    "spoil, split, message",
    [
        (lambda root: None, "vall", "split 'vall' is not in .*: ImageSets/Segmentation has train"),
        (lambda root: None, "../../train", "split '../../train' is not in"),
        (lambda root: None, "", "split '' is not in"),
        (
            lambda root: write_list(root, "train", ["", " "]),
            "train",
            "split 'train' is empty: .*train.txt names no image",
        ),
        (
            lambda root: write_list(root, "train", ["img_0", "img_77", "img_78", "img_79"]),
            "train",
            r"img_77 .*named in train.txt, does not exist \(2 more are missing\)",
        ),
        (lambda root: write_list(root, "train", ["img_0", "img_77"]), "train", "img_77 .*named in train.txt, does not"),
        (lambda root: write_list(root, "train", ["img_0", "img_1", "img_0"]), "train", "names 'img_0' more than once"),
        (lambda root: (root / "SegmentationClass/img_1.png").unlink(), "train", "img_1.jpg has no mask img_1.png"),
        (lambda root: (root / "classes.txt").write_text("cat\ndog\ncat"), "train", "the class 'cat' more than once"),
        (lambda root: (root / "classes.txt").write_text("background\n"), "train", "names 0 classes"),
        (lambda root: (root / "classes.txt").write_bytes(b"\xff\xfe\xfa"), "train", "classes.txt cannot be read"),
        (lambda root: (root / "ImageSets/Segmentation/train.txt").write_bytes(b"\xff\xfe"), "train", "cannot be read"),
    ],
)
def test_opening_names_what_is_wrong(root, spoil, split, message):
    spoil(root)
    with pytest.raises(ToCoError, match=message) as caught:
        VOCFolder(root, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    ["../secret", "/etc/passwd", "a/../../b", "..", "C:\\a", "C:/a", "..\\a", "/JPEGImages/../../x.jpg", "a\0b"],
)
def test_entries_that_lead_out_of_the_folder_are_refused(root, entry):
    Image.fromarray(smooth_image(9, 9, 0)).save(root.parent / "secret.png")
    write_list(root, "train", ["img_0", entry])
    with pytest.raises(ToCoError, match="train.txt line 2: .* is not a name inside JPEGImages"):
        VOCFolder(root, "train")


def test_missing_folders_are_named(root, tmp_path):
    with pytest.raises(
        ToCoError, match="dataset folder .*nowhere does not exist; a VOC-layout folder holds JPEGImages/"
    ):
        VOCFolder(tmp_path / "nowhere", "train")
    with pytest.raises(ToCoError, match="dataset folder .* has no JPEGImages/, .*did you mean .*data"):
        VOCFolder(tmp_path, "train")
    with pytest.raises(ToCoError, match="classes.txt is a file"):
        VOCFolder(root / "classes.txt", "train")
    (root / "SegmentationClass").rename(tmp_path / "gone")
    with pytest.raises(ToCoError, match="has no SegmentationClass/"):
        VOCFolder(root, "train")
    with pytest.raises(ToCoError, match="has no mask to derive its image labels from"):
        VOCFolder(root, "train", require_masks=False).image_labels  # noqa: B018


@pytest.mark.parametrize("content, message", [("<annotation><object>", "not valid XML"), (None, "cannot be read")])
def test_bad_annotations_are_named(root, content, message):
    (root / "Annotations").mkdir()
    if content:
        (root / "Annotations" / "img_0.xml").write_text(content)
    with pytest.raises(ToCoError, match=f"img_0.xml (is )?{message}"):
        VOCFolder(root, "train", labels="xml").image_labels  # noqa: B018


def write_annotation(root, name, objects):
    (root / "Annotations").mkdir(exist_ok=True)
    body = "".join(f"<object><name>{kind}</name><bndbox><xmin>1</xmin></bndbox></object>" for kind in objects)
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{body}</annotation>")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("img_0 /", None),
        ("img_0 //", None),
        ("img_0 SegmentationClass\0x/img_0.png", "line 1: .* is not a name inside"),
    ],
)
def test_odd_second_columns(root, line, message):
    """They ended in IndexError, and in the ValueError of a NUL in a path."""
    (root / "ImageSets/Segmentation/train.txt").write_text(f"{line}\n")
    if message is None:
        assert VOCFolder(root, "train").names == ("img_0",)
    else:
        with pytest.raises(ToCoError, match=message):
            VOCFolder(root, "train")


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "idna"])
def test_unknown_encodings_of_annotations(root, encoding):
    (root / "Annotations").mkdir()
    for i in range(9):
        (root / f"Annotations/img_{i}.xml").write_text(f'<?xml version="1.0" encoding="{encoding}"?><annotation/>')
    with pytest.raises(ToCoError, match="img_0.xml is not valid XML"):
        VOCFolder(root, "train", labels="xml").image_labels  # noqa: B018


@pytest.mark.parametrize(
    "row", [np.array(1), [10**5000, 1, 1], [[1], [1, 2]], ["cat", 1], np.array([b"a", b"b", b"c"]), 7, None, "cat"]
)
def test_rows_that_are_none(root, row):
    labels = {f"img_{i}": row for i in range(9)}
    with pytest.raises(ToCoError, match="labels for 'img_0' is .*: a row of 3 numbers 0 or 1, or class names"):
        VOCFolder(root, "train", labels=labels)
