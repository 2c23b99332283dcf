import json
import os
import unicodedata

import numpy as np
import pytest
from coco_folder import SIZES, write_images
from PIL import Image
from voc_folder import rectangle_mask, save_palette_mask, write_voc_folder

from toco_core.commands.check import check_command as main
from toco_core.data import ClassFolders, TagList, VOCFolder, open_source, open_train_val, recognise, split_names
from toco_core.data.layouts.tags import write_tag_list
from toco_core.errors import ToCoError

FILES = ["a.jpg", "sub/b.png", "Straße 猫.jpg", "d.bmp"]


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", FILES)


def write(photos, name, text):
    (photos / name).write_text(text, encoding="utf-8")
    return photos / name


# ---- a folder per class


def test_a_folder_per_class(tmp_path):
    root = write_images(tmp_path / "own", ["dog/1.jpg", "dog/2.png", "cat/1.jpg", "background/x.jpg"])
    folder = ClassFolders(root)
    assert folder.class_names == ("background", "cat", "dog") and folder.split == "train"
    assert folder.names == ("background/x", "cat/1", "dog/1", "dog/2")
    assert folder.image_labels.tolist() == [[0, 0], [1, 0], [0, 1], [0, 1]]
    assert folder.mask(0) is None and folder.n_masks == 0
    report = folder.check()
    assert (report.n_images, report.n_masks, report.n_without_class) == (4, 0, 1) and np.isnan(report.void_share)
    pair = open_train_val(root, fraction=0.5)
    assert pair.held_out and set(pair.train.names) | set(pair.val.names) == set(folder.names)


def test_folders_per_class_below_splits_with_masks(tmp_path):
    files = ["train/dog/1.jpg", "train/cat/1.jpg", "validation/cat/2.jpg"]
    root = write_images(tmp_path / "own", files)
    (root / "masks/train/cat").mkdir(parents=True)
    save_palette_mask(rectangle_mask(*SIZES[1], 1), root / "masks/train/cat/1.png")
    assert split_names(root) == ("train", "val")
    train, val = open_source(root, "train"), open_source(root, "val")
    assert train.class_names == val.class_names == ("background", "cat", "dog")
    assert train.names == ("train/cat/1", "train/dog/1") and val.names == ("validation/cat/2",)
    np.testing.assert_array_equal(train.mask(0), rectangle_mask(*SIZES[1], 1))
    assert (train.n_masks, val.n_masks) == (1, 0)
    with pytest.raises(ToCoError, match="split 'test' is not in .*own: there is train, val"):
        ClassFolders(root, "test")


def test_hidden_files_and_folders_are_no_training_images(tmp_path):
    """Thumbnails of a photo program or a NAS, and what macOS leaves in archives, were trained on."""
    files = ["cat/0.jpg", "cat/.thumbnails/0.jpg", "cat/@eaDir/0.jpg", "cat/deep/__MACOSX/0.jpg", "cat/deep/1.jpg"]
    root = write_images(tmp_path / "own", [*files, "train/dog/0.jpg", "@eaDir/0.jpg"])
    for name in ("cat/._0.jpg", "train/._0.jpg"):
        (root / name).write_bytes(b"Mac OS X")
    assert ClassFolders(root).names == ("train/dog/0",)  # the folder `train` holds no picture of its own
    (root / "train").rename(root / "dog")
    assert ClassFolders(root).names == ("cat/0", "cat/deep/1", "dog/dog/0")


# ---- tables and JSON

LISTS = {
    "tags.csv": 'file,tags\na.jpg,cat;dog\nsub/b.png,"dog, cat"\n\nStraße 猫.jpg,\nd,sheep\n',
    "tags.tsv": "\ufefffile_name\tlabels\na\tcat|dog\nsub/b.png\tcat|dog\nStraße 猫.jpg\t\nd.bmp\tsheep\n",
    "labels.csv": "image;cat;dog;sheep\na.jpg;1;1;0\nsub/b.png;1;1;0\nStraße 猫.jpg;0;0;0\nd.bmp;0;0;1\n",
    "tags.json": json.dumps({"a.jpg": ["cat", "dog"], "sub/b": ["dog", "cat"], "Straße 猫.jpg": [], "d.bmp": "sheep"}),
    "labels.json": json.dumps(
        [
            {"file": "a.jpg", "tags": ["cat", "dog"]},
            {"file_name": "sub/b.png", "labels": ["dog", "cat"]},
            {"path": "Straße 猫.jpg", "tags": ["background"]},
            {"image": "d", "class": "sheep"},
        ]
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_every_kind_of_list_says_the_same(photos, name):
    path = write(photos, name, LISTS[name])
    for dataset in (path, photos):
        source = open_source(dataset)
        assert isinstance(source, TagList) and source.root == path
        assert source.class_names == ("background", "cat", "dog", "sheep")
        assert source.names == ("a", "sub/b", "Straße 猫", "d")
        assert source.image_labels.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]
        assert [source.image(i).shape[:2] for i in range(4)] == [SIZES[i % 3] for i in range(4)]


def test_splits_and_masks_in_a_table(photos):
    save_palette_mask(rectangle_mask(*SIZES[0], 2), photos / "m.png")
    path = write(
        photos, "tags.csv", "file,tags,split,mask\na.jpg,dog,train,m.png\nsub/b.png,cat,valid,\nd,cat,train,\n"
    )
    assert split_names(path) == ("train", "val")
    train = TagList(path, "train")
    assert train.names == ("a", "d") and train.n_masks == 1 and train.mask(1) is None
    np.testing.assert_array_equal(train.mask(0), rectangle_mask(*SIZES[0], 2))
    assert open_train_val(photos).val.names == ("sub/b",)


def test_classes_txt_orders_the_classes(photos):
    path = write(photos, "tags.csv", "file,tags\na.jpg,dog\nd.bmp,cat\n")
    write(photos, "classes.txt", "dog\ncow\ncat\n")
    assert TagList(path).image_labels.tolist() == [[1, 0, 0], [0, 0, 1]]
    write(photos, "classes.txt", "dog\ncow\n")
    with pytest.raises(ToCoError, match="tags.csv: d.bmp names the class 'cat': known are dog, cow"):
        TagList(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tags.csv", "", "has no column 'file' but nothing; a table has the columns"),
        ("tags.csv", "photo,tags\na.jpg,cat\n", "has no column 'file' but photo, tags"),
        ("tags.csv", "file,tags\n", "names no image"),
        ("tags.csv", "file,tags\na.jpg\n", "row 2 has 1 columns, the header has 2"),
        ("tags.csv", "file,cat\na.jpg,yes\n", "row 2: cat = 'yes', 0 or 1 is wanted"),
        ("tags.csv", "file,tags\na.jpg,\n", "names no class: every image would be background"),
        ("tags.csv", "file,tags\na.jpg,cat\na.jpg,dog\n", "has the image 'a' more than once"),
        ("tags.csv", "file,tags\ngone.jpg,cat\n", "gone.jpg, named in tags.csv, does not exist"),
        ("tags.csv", "file,tags\ntags.csv,cat\n", "names 'tags.csv': allowed are .jpg"),
        ("tags.csv", "file,tags,mask\na.jpg,cat,gone.png\n", "gone.png, a mask named in tags.csv, does not exist"),
        ("tags.csv", 'file,tags\n"a.jpg,cat\n', "cannot be read as a table"),
        ("tags.json", "{", "tags.json is not valid JSON"),
        ("tags.json", "3", "holds a int: .* is wanted"),
        ("tags.json", '{"a.jpg": 3}', "entry 0 has the tags 3: a list of texts is wanted"),
        ("tags.json", "[3]", "entry 0 is 3: an object with file and tags is wanted"),
        ("tags.json", '[{"tags": ["cat"]}]', "entry 0: None is not a name inside the list's folder"),
        ("tags.json", '[{"file": "a.jpg", "tags": ["cat"], "split": 3}]', "entry 0: split 3 is not allowed"),
    ],
)
def test_lists_that_are_refused(photos, name, text, message):
    path = write(photos, name, text)
    with pytest.raises(ToCoError, match=message) as caught:
        TagList(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("listed", "file", "name"),
    [
        ("A", "A.JPG", "A"),
        ("A.jpg", "A.JPG", "A"),
        ("A.JPG", "A.jpg", "A"),
        ("sub/a.png", "sub/a.png.JPG", "sub/a.png"),
        (unicodedata.normalize("NFC", "sé/ü"), unicodedata.normalize("NFD", "sé/ü.jpg"), "sé/ü"),
        (unicodedata.normalize("NFD", "sé/ü.jpg"), unicodedata.normalize("NFC", "sé/ü.jpg"), "sé/ü"),
        ("img\\c.jpg", "img/c.jpg", "img/c"),
        (".\\img\\sub\\c", "img/sub/c.png", "img/sub/c"),
    ],
)
def test_files_are_found_as_any_system_spells_them(tmp_path, listed, file, name):
    root = write_images(tmp_path / "photos", [file])
    source = TagList(write(root, "tags.json", json.dumps({listed: ["cat"]})))
    assert source.image_path(0).samefile(root / file)
    assert unicodedata.normalize("NFC", source.names[0]) == name
    if "/" in listed:  # as the list has it, so that a data set has the same names on every system
        assert listed.startswith(source.names[0])


def test_masks_are_found_as_any_system_spells_them(tmp_path):
    root = write_images(tmp_path / "photos", ["a.jpg"])
    mask = root / "masks" / unicodedata.normalize("NFD", "ü.PNG")
    mask.parent.mkdir()
    save_palette_mask(rectangle_mask(*SIZES[0], 1), mask)
    source = TagList(write(root, "tags.csv", unicodedata.normalize("NFC", "file,tags,mask\na.jpg,cat,masks\\ü.png\n")))
    np.testing.assert_array_equal(source.mask(0), rectangle_mask(*SIZES[0], 1))


def test_a_text_of_json_is_split_as_a_cell(photos):
    """It was one class with the name `cat;dog`."""
    path = write(photos, "tags.json", json.dumps({"a.jpg": "cat;dog", "d.bmp": "dog, sheep", "sub/b": ["salt;pepper"]}))
    source = TagList(path)
    assert source.class_names == ("background", "cat", "dog", "salt;pepper", "sheep")
    assert source.image_labels.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]


def test_a_file_that_only_differs_in_kind_is_not_taken(photos):
    for listed in ("d.jpg", "A.jpg", "a.JPEG"):  # there are d.bmp and a.jpg; names keep their capitals
        with pytest.raises(ToCoError, match=f"{listed}, named in tags.csv, does not exist"):
            TagList(write(photos, "tags.csv", f"file,tags\n{listed},cat\n"))


@pytest.mark.parametrize(
    "entry",
    ["../secret.jpg", "/etc/passwd", "sub/../../a.jpg", "C:\\a.jpg", "..\\a.jpg", "a\0.jpg"]
    + ["sub\\..\\..\\secret.jpg", "\\\\server\\a.jpg", "\\a.jpg", "C:a.jpg"],
)
def test_entries_that_lead_out_of_the_folder_are_refused(photos, entry):
    Image.new("RGB", (4, 4)).save(photos.parent / "secret.jpg")
    for file, mask in ((entry, None), ("a.jpg", entry)):
        content = [{"file": file, "tags": ["cat"], "mask": mask}]
        path = write(photos, "tags.json", json.dumps(content))
        with pytest.raises(ToCoError, match="entry 0: .* is not a name inside the list's folder"):
            TagList(path)


def test_a_file_that_is_no_text(photos):
    (photos / "tags.csv").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ToCoError, match="tags.csv cannot be read as a list of tags"):
        TagList(photos / "tags.csv")


def test_a_data_set_written_as_tags_says_the_same(tmp_path):
    voc = write_voc_folder(tmp_path / "voc", splits={"train": range(4), "val": range(4, 6)})
    splits = {name: VOCFolder(voc, name) for name in ("train", "val")}
    path = write_tag_list(tmp_path / "tags", splits, masks=["val"])
    for name, source in splits.items():
        copy = open_source(tmp_path / "tags", name)
        assert copy.root == path and copy.class_names == source.class_names
        np.testing.assert_array_equal(copy.image_labels, source.image_labels)
        for i in range(len(source)):
            np.testing.assert_array_equal(copy.image(i), source.image(i))
            if name == "val":
                np.testing.assert_array_equal(copy.mask(i), source.mask(i))
        assert copy.n_masks == (2 if name == "val" else 0)
    with pytest.raises(ToCoError, match="is not empty"):
        write_tag_list(tmp_path / "tags", splits)


# ---- which layout is it?


def test_layouts_are_recognised(tmp_path, photos):
    voc = write_voc_folder(tmp_path / "voc", splits={"train": range(4), "val": range(4, 6)})
    assert recognise(voc).kind == "VOC" and recognise(voc).splits == ("train", "val")
    assert isinstance(open_source(str(voc), "val"), VOCFolder)
    own = write_images(tmp_path / "own", ["dog/1.jpg", "cat/1.jpg"])
    assert recognise(own) == ("folder per class", own, ("train",))
    path = write(photos, "tags.csv", "file,tags,split\na.jpg,cat,test\n")
    assert recognise(photos) == ("list of tags", path, ("test",))


def test_what_is_no_data_set_is_described(tmp_path):
    with pytest.raises(ToCoError, match="nowhere does not exist; allowed are 'scenes'"):
        open_source(tmp_path / "nowhere")
    write_images(tmp_path / "flat", ["a.jpg", "b.jpg"])
    (tmp_path / "flat" / "notes").mkdir()
    with pytest.raises(ToCoError, match="flat holds notes/, 2 .jpg files; allowed are 'scenes'; JPEGImages/ with"):
        open_source(tmp_path / "flat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToCoError, match="empty holds nothing; allowed"):
        open_source(tmp_path / "empty")
    with pytest.raises(ToCoError, match="a file that is neither .csv, .tsv nor .json"):
        open_source(tmp_path / "flat" / "a.jpg")
    write_voc_folder(tmp_path / "devkit" / "VOC2012", classes=None)
    with pytest.raises(ToCoError, match="devkit holds VOC2012/; did you mean .*devkit/VOC2012"):
        open_source(tmp_path / "devkit")
    with pytest.raises(ToCoError, match="broken = 'ignore' is not allowed: one of 'stop', 'leave out'"):
        open_source(tmp_path / "empty", broken="ignore")
    with pytest.raises(ToCoError, match=r"VOC2012 \(VOC\) cannot be opened with .*colours"):
        open_source(tmp_path / "devkit" / "VOC2012", colours=3)


# ---- broken files


def test_broken_files_stop_or_are_left_out_with_a_count(photos):
    path = write(photos, "tags.csv", LISTS["tags.csv"])
    for file in ("a.jpg", "d.bmp"):
        data = (photos / file).read_bytes()
        (photos / file).write_bytes(data[:-40] if file == "a.jpg" else b"")
    with pytest.raises(ToCoError, match=r"a.jpg is truncated.*\(1 more of 4 files have problems\)"):
        open_source(path).check()
    with pytest.warns(UserWarning, match="2 of 4 images are left out: .*a.jpg is truncated.*d.bmp is empty"):
        source = open_source(path, broken="leave out")
    assert source.names == ("sub/b", "Straße 猫") and source.image_labels.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert [*source.left_out] == ["a", "d"] and "2 left out" in repr(source)
    assert "2 left out: " in str(source.check()) and source.check().n_images == 2
    with pytest.warns(UserWarning):
        pair = open_train_val(path, broken="leave out", fraction=0.5)
    assert len(pair.train) == len(pair.val) == 1
    (photos / "sub/b.png").write_bytes(b"")
    (photos / "Straße 猫.jpg").write_bytes(b"")
    with pytest.raises(ToCoError, match="none of the 4 images"):
        open_source(path, broken="leave out")


def test_nothing_is_left_out_of_a_sound_folder(tmp_path, recwarn):
    root = write_voc_folder(tmp_path / "voc")
    source = open_source(root, broken="leave out")
    assert len(source) == 6 and not source.left_out and not [w for w in recwarn if "left out" in str(w.message)]


def test_a_mask_that_does_not_fit_is_left_out_before_labels_are_derived(tmp_path):
    root = write_voc_folder(tmp_path / "voc")
    save_palette_mask(rectangle_mask(9, 9, 1), root / "SegmentationClass" / "img_0.png")
    with pytest.warns(UserWarning, match="img_0.png is 9 x 9"):
        source = open_source(root, broken="leave out")
    assert source.names[0] == "img_1" and source.image_labels.tolist() == np.eye(3)[[1, 2, 0, 1, 2]].tolist()


def test_a_class_folder_that_is_a_link_out_of_the_data_is_refused(tmp_path):
    """`cat -> /home/you/Pictures` made every picture below it a training image, and an export handed them on."""
    write_images(tmp_path / "pictures", ["private.jpg", "deep/er.jpg"])
    root = tmp_path / "mine"
    write_images(root, ["dog/a.jpg", "sheep/b.jpg"])
    (root / "cow").symlink_to(root / "dog")
    assert open_source(root).class_names == ("background", "cow", "dog", "sheep")
    for name in ("cat", "masks"):
        (root / name).symlink_to(tmp_path / "pictures")
        with pytest.raises(ToCoError, match=f"{name} is a link to .*pictures, outside of .*mine: put"):
            open_source(root)
        (root / name).unlink()


def test_names_that_are_not_utf8_are_refused_by_name(tmp_path):
    """They came from archives in Latin-1 and ended in UnicodeEncodeError when lists were written or hashed."""
    write_images(tmp_path, ["cat/a.jpg", "dog/b.jpg"])
    os.rename(tmp_path / "cat" / "a.jpg", os.fsencode(tmp_path / "cat") + b"/caf\xe9.jpg")
    with pytest.raises(ToCoError, match=r"'cat/caf.*e9' is no text in UTF-8: rename it"):
        open_source(tmp_path)
    with pytest.raises(ToCoError, match="no text in UTF-8"):
        open_train_val(tmp_path)
    assert main([str(tmp_path)]) == 1


@pytest.mark.parametrize("split", ["../../../escaped", "a/b", "/etc", "..", "a\0", "a\nb"])
def test_splits_are_plain_names(tmp_path, split):
    """An export wrote ImageSets/Segmentation/<split>.txt two folders above the new one."""
    write_images(tmp_path, ["a.png"])
    (tmp_path / "tags.json").write_text(json.dumps([{"file": "a.png", "tags": ["cat"], "split": split}]))
    with pytest.raises(ToCoError, match="tags.json entry 0: .*(is not a name inside|a plain name is wanted)"):
        open_source(tmp_path / "tags.json", split)


def test_a_name_of_dots_keeps_its_suffix(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "...jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "tags.csv").write_text("file,tags\n...jpg,cat\na.jpg,cat\n")
    assert open_source(tmp_path / "tags.csv").names == ("...jpg", "a")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_without_rights_is_named(tmp_path):
    write_images(tmp_path, ["cat/a.jpg", "dog/b.jpg"])
    (tmp_path / "dog").chmod(0)
    with pytest.raises(ToCoError, match="dog cannot be read: Permission denied"):
        open_source(tmp_path)
