import cv2
import numpy as np
import pytest
from coco_folder import write_coco_folder, write_images
from growth import memory_growth
from PIL import Image
from voc_folder import CLASSES, rectangle_mask, save_palette_mask, write_list, write_voc_folder

from toco_core.commands.check import check_command as main
from toco_core.data import VOC_CLASSES, VOCFolder, open_source, open_train_val
from toco_core.data.survey import fingerprint, how_to_get, inventory, near_pairs, survey
from toco_core.errors import ToCoError


def scene(height, width, seed):
    """A picture with detail of several sizes."""
    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.integers(0, 256, (n, n, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        for n in (3, 6, 13)
    ]
    return np.mean(layers, axis=0).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    """Ten pictures that have nothing to do with each other, in two splits."""
    root = write_voc_folder(tmp_path / "data", n=10, splits={"train": range(6), "val": range(6, 10)})
    for i in range(10):
        save(root, i, scene(80 + 3 * i, 110 - 4 * i, i))
    return root


def save(root, i, image, quality=92):
    Image.fromarray(image).save(root / "JPEGImages" / f"img_{i}.jpg", quality=quality)
    save_palette_mask(rectangle_mask(*image.shape[:2], 1 + i % 3), root / "SegmentationClass" / f"img_{i}.png")


def looked_over(root, splits=("train", "val")):
    return survey([open_source(root, split) for split in splits], progress=False)


def test_a_sound_data_set(root):
    found = looked_over(root)
    assert not found.unreadable and not found.same
    train, val = found.parts
    assert (train.split, len(train.names), train.n_masks, val.split, len(val.names)) == ("train", 6, 6, "val", 4)
    assert train.images_per_class.tolist() == [2, 2, 2] and train.class_names == CLASSES
    assert train.sizes.tolist() == [[80 + 3 * i, 110 - 4 * i] for i in range(6)]
    assert "train: 6 images, 6 masks, 0 of no class; cat 2, dog 2, sheep 2" in str(found)
    assert "leaks between splits: 0" in str(found)


def test_duplicates_and_leaks_are_told_apart(root):
    save(root, 3, scene(80, 110, 0), quality=60)  # image 0 again, more compressed: within train, another label? no: 1
    save(root, 8, cv2.resize(scene(83, 106, 1), (60, 50), interpolation=cv2.INTER_AREA))  # image 1, smaller, in val
    found = looked_over(root)
    assert [(p.one, p.other, p.same_labels) for p in found.duplicates] == [
        (("train", "img_0"), ("train", "img_3"), True)
    ]
    assert [(p.one, p.other, p.same_labels) for p in found.leaks] == [(("train", "img_1"), ("val", "img_8"), False)]
    assert "train/img_1 = val/img_8, with different labels" in str(found)
    assert all(0 <= pair.bits <= 16 for pair in found.same)


def test_lists_that_hold_each_other_by_design_are_no_leak(root):
    write_list(root, "trainval", ["img_1", "img_8"])
    write_list(root, "extra", ["img_1"])
    found = looked_over(root, ("train", "trainval", "extra"))
    assert {(p.one[0], p.other[0]) for p in found.leaks} == {("train", "extra"), ("trainval", "extra")}


@pytest.mark.parametrize("longer, shorter", [("trainval", "train"), ("all", "train"), ("train", "corrected")])
def test_what_comes_twice_in_the_longer_list_is_no_leak(root, longer, shorter):
    """Pictures 0 and 3 are the same; only with another list, val, does one of them leak."""
    save(root, 3, scene(80, 110, 0))
    for split, numbers in {longer: (0, 1, 3), shorter: (0, 1), "val": (3, 6)}.items():
        write_list(root, split, [f"img_{i}" for i in numbers])
    assert [p.one[0] for p in looked_over(root, (longer, shorter)).duplicates] == [longer]
    assert not looked_over(root, (longer, shorter)).leaks
    leaks = looked_over(root, (longer, shorter, "val")).leaks
    assert ((shorter, "img_0"), ("val", "img_3")) in [(p.one, p.other) for p in leaks]


def test_what_the_package_itself_writes_has_no_leak(root, capsys):
    """The lists of `toco export --split all`, and the one of `toco corrected`."""
    write_list(root, "all", [f"img_{i}" for i in range(10)])
    write_list(root, "corrected", ["img_2", "img_7"])
    assert main([str(root)]) == 0 and "leaks between splits: 0" in capsys.readouterr().out


def test_a_part_of_cocos_val_has_no_leak(tmp_path, capsys):
    root = write_coco_folder(tmp_path / "own", {"train": range(4), "val": range(4, 24)})
    for path in sorted(root.glob("*2014/*.jpg")):  # their sides stay
        with Image.open(path) as image:
            size = image.size
        Image.fromarray(scene(size[1], size[0], int(path.stem[-12:]))).save(path, quality=92)
    assert len(open_source(root, "val_part")) < len(open_source(root, "val"))
    assert main([str(root)]) == 0
    told = capsys.readouterr().out
    assert "splits train, val, val_part" in told and "leaks between splits: 0" in told
    copied = root / "train2014" / "COCO_train2014_000000000001.jpg"  # of the size of image 4
    copied.write_bytes((root / "val2014" / "COCO_val2014_000000000004.jpg").read_bytes())
    assert main([str(root)]) == 1 and "= val/COCO_val2014_000000000004" in capsys.readouterr().out


def test_equal_pixels_are_known(root):
    data = (root / "JPEGImages" / "img_2.jpg").read_bytes()
    (root / "JPEGImages" / "img_7.jpg").write_bytes(data)
    save_palette_mask(rectangle_mask(86, 102, 2), root / "SegmentationClass" / "img_7.png")
    (pair,) = looked_over(root).leaks
    assert pair.bits == -1


def test_broken_files_are_listed_each_by_name(root):
    (root / "JPEGImages" / "img_2.jpg").write_bytes(b"")
    save_palette_mask(rectangle_mask(9, 9, 1), root / "SegmentationClass" / "img_6.png")
    found = looked_over(root)
    assert len(found.unreadable) == 2
    assert "img_2.jpg is empty" in found.parts[0].unreadable[0] and "img_6.png is 9 x 9" in found.parts[1].unreadable[0]
    assert found.parts[0].names == tuple(f"img_{i}" for i in (0, 1, 3, 4, 5))
    assert "unreadable: 2\n  " in str(found)


def test_links_out_of_the_data_set_are_counted(root, tmp_path):
    assert "lead out" not in str(looked_over(root))
    image = root / "JPEGImages" / "img_7.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    found = looked_over(root)
    assert [part.outside for part in found.parts] == [(), ("img_7",)] and not found.unreadable
    assert "links that lead out of the data set: 1, the first is val/img_7" in str(found)


@pytest.mark.parametrize("seed", range(12))
def test_a_fingerprint_survives_size_compression_and_brightness(seed):
    image = scene(90 + seed, 130, seed)
    smaller = cv2.resize(image, (71, 55), interpolation=cv2.INTER_AREA)
    darker = (image * 0.7).astype(np.uint8)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 50])
    prints = [fingerprint(x) for x in (image, smaller, darker, cv2.imdecode(data, cv2.IMREAD_COLOR))]
    others = [fingerprint(x) for x in (image[:, ::-1], scene(90, 130, 100 + seed))]
    for other in prints[1:]:
        assert np.bitwise_count(prints[0] ^ other).sum() <= 16
    for other in others:
        assert np.bitwise_count(prints[0] ^ other).sum() > 50


def test_near_pairs_equal_a_comparison_bit_by_bit():
    rng = np.random.default_rng(0)
    bits = rng.random((30, 128)) < 0.5
    bits[7], bits[20] = bits[3], bits[4]
    bits[20, [5, 99]] ^= True
    prints = np.packbits(bits, axis=1).view(np.uint64)
    wanted = [
        (i, j, int((bits[i] != bits[j]).sum()))
        for i in range(30)
        for j in range(i + 1, 30)
        if (bits[i] != bits[j]).sum() <= 50
    ]
    assert near_pairs(prints, 50) == wanted and (3, 7, 0) in wanted and (4, 20, 2) in wanted
    assert near_pairs(prints[:0], 3) == []


@pytest.mark.parametrize("way", ["survey", "check", "labels", "readable"])
def test_what_is_kept_of_each_image_does_not_hold_the_memory_of_its_pixels(tmp_path, way):
    """Small arrays between the pixels that go kept 160 KB of each photograph: 20 GB of COCO's."""
    root = write_voc_folder(tmp_path / "data", n=1)
    image = root / "JPEGImages" / "img_0.jpg"
    Image.fromarray(scene(375, 500, 0)).save(image)
    save_palette_mask(rectangle_mask(375, 500, 1), root / "SegmentationClass" / "img_0.png")
    for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
        for i in range(1, 300):
            (root / folder / f"copy_{i}{suffix}").hardlink_to(root / folder / f"img_0{suffix}")
    write_list(root, "train", ["img_0", *(f"copy_{i}" for i in range(1, 300))])
    source = open_source(root, "train")
    ways = {
        "survey": lambda part: survey([part], near=-1, progress=False),
        "check": lambda part: part.check(progress=False),
        "labels": lambda part: part.image_labels,
        "readable": lambda part: part.readable(progress=False),
    }
    ways[way](source.subset(range(40)))
    growth = memory_growth()
    ways[way](source)
    assert growth() < 20  # megabytes


def test_each_file_is_decoded_once(root, monkeypatch):
    read = []
    for what in ("image", "mask"):
        whole = getattr(VOCFolder, what)
        monkeypatch.setattr(
            VOCFolder,
            what,
            lambda self, i, whole=whole, what=what: read.append((what, self.names[i])) or whole(self, i),
        )
    looked_over(root)
    assert sorted(read) == sorted((what, f"img_{i}") for what in ("image", "mask") for i in range(10))


def tagged(root, masks, tags=("cat", "dog", "cat;dog", "")):
    """Pictures with one of `tags` each and a mask."""
    (root / "masks").mkdir(parents=True)
    rows = ["file,tags,mask"]
    for i, (mask, tag) in enumerate(zip(masks, tags, strict=True)):
        Image.fromarray(scene(*mask.shape, i)).save(root / f"{i}.jpg", quality=92)
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
        rows.append(f"{i}.jpg,{tag},masks/{i}.png")
    (root / "tags.csv").write_text("\n".join(rows) + "\n")
    return root


def halves(left, right=0):
    mask = np.full((40, 60), right, np.uint8)
    mask[:, :30] = left
    return mask


def test_masks_that_show_no_class_are_named(tmp_path, capsys):
    """0 and 255, as drawing programs write them, were 24 sound masks, and an mIoU of 100."""
    root = tagged(tmp_path / "own", [halves(255), halves(0), halves(1), halves(255)])
    assert main([str(root), "--split", "train"]) == 1
    told = capsys.readouterr().out
    assert "1 of no class; cat 2, dog 2; 25.0% of the mask pixels void\n" in told and "unreadable: 0" in told
    assert "masks of train that contradict the labels: 2 (1 cat, 2 dog)\n" in told
    assert (
        "  0: the image has labels, but the mask shows no class; 255 is void and no class: 50.0% of its pixels" in told
    )
    assert "  1: the image has labels, but the mask shows no class\n" in told
    (found,) = survey([open_source(root)], progress=False).parts
    assert [(mask.name, mask.others) for mask in found.odd_masks] == [("0", ()), ("1", ())]


def test_masks_that_show_what_the_tags_do_not_are_named(tmp_path, capsys):
    """Their classes were numbered in another order than the sorted tags, or belong to other pictures."""
    root = tagged(tmp_path / "own", [halves(2), halves(1, 2), halves(1, 2), halves(1)])
    assert main([str(root), "--split", "train"]) == 1
    told = capsys.readouterr().out
    assert "contradict the labels: 3 (1 cat, 2 dog)\n  0: the mask shows dog, which the labels do not have\n" in told
    assert "  1: the mask shows cat, which" in told and "  3: the mask shows cat, which" in told
    (root / "classes.txt").write_text("dog\ncat\n")
    assert [mask.name for mask in survey([open_source(root)], progress=False).odd_masks] == ["1", "3"]


def test_many_masks_are_counted_and_the_first_named(tmp_path):
    root = tagged(tmp_path / "own", [halves(255)] * 13, ["cat"] * 13)
    told = str(survey([open_source(root)], progress=False))
    assert told.count("shows no class") == 10 and "\n  and 3 more\n" in told


def test_masks_that_fit_their_tags_are_sound(tmp_path, capsys):
    """Void beside a class, and a tag of what is hidden in the mask, are no contradiction."""
    root = tagged(tmp_path / "own", [halves(1, 255), halves(2), halves(1), halves(0)])
    assert main([str(root)]) == 0 and "contradict" not in capsys.readouterr().out


# ---- what is there, what is missing


SUFFIXES = ["cat/0.jpg", "cat/0.png", "cat/0.JPG", "dog/x.jpeg", "dog/x.bmp", "masks/cat/0.png", "masks/cat/0.bmp"]


def test_pictures_that_are_not_used_are_named(tmp_path, capsys):
    """Three of them and the WebP were gone without a word."""
    root = write_images(tmp_path / "own", SUFFIXES)
    for path in (root / "masks" / "cat").iterdir():
        Image.new("L", Image.open(root / "cat" / "0.JPG").size, 1).save(path)
    for file in ("cat/w.webp", "masks/m.webp", "cat/.thumbnails/w.webp"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"RIFF")
    assert main([str(root)]) == 0
    told = capsys.readouterr().out
    assert "not used: 4\n" in told and f"  {root}/cat/0.jpg: 0.JPG has the same name\n" in told
    assert f"  {root}/cat/w.webp: .webp is not read: .jpg, .jpeg, .png, .bmp are\n" in told
    assert {line.split(":")[0] for line in inventory(root).unused} == {
        f"{root}/{file}" for file in ("cat/0.jpg", "cat/0.png", "cat/w.webp", "dog/x.bmp")
    }
    voc = write_voc_folder(tmp_path / "voc", n=3)
    assert inventory(voc).unused == ()
    (voc / "JPEGImages" / "img_1.png").write_bytes(b"")
    assert inventory(voc).unused == (f"{voc}/JPEGImages/img_1.png: img_1.jpg has the same name",)


def test_hidden_files_are_not_counted(tmp_path):
    files = ["cat/1.jpg", "cat/.thumbnails/1.jpg", "cat/._1.jpg", "@eaDir/1.jpg", "masks/cat/.thumbnails/1.png"]
    found = inventory(write_images(tmp_path / "own", files))
    counts = {entry.what: entry.found for entry in found.entries}
    assert counts == {"images": 1, "cat/": 1, "masks/ (optional)": 0, "classes.txt (optional)": 0}
    voc = write_voc_folder(tmp_path / "voc", n=2)
    (voc / "JPEGImages" / "._img_1.jpg").write_bytes(b"")
    assert inventory(voc).entries[0].found == 2


def test_inventory_of_voc(tmp_path):
    root = write_voc_folder(tmp_path / "VOC2012", n=3, classes=None)
    found = inventory(root)
    counts = {e.what: (e.found, e.expected) for e in found.entries}
    assert counts["JPEGImages/"] == (3, 17125) and counts["SegmentationClassAug/"] == (0, 12031)
    assert counts["ImageSets/Segmentation/train.txt"] == (3, 1464)
    assert counts["ImageSets/Segmentation/train_aug.txt"] == (0, 10582)
    text = str(found)
    assert "3 of 17125   get: VOCtrainval_11-May-2012.tar" in text and "missing   get: SBD" in text
    assert len(found.missing) == len(found.entries)


def test_inventory_of_other_layouts(tmp_path):
    voc = inventory(write_voc_folder(tmp_path / "own", n=4))
    assert not voc.missing and {e.what: e.found for e in voc.entries}["classes.txt (optional)"] == 4
    coco = inventory(write_coco_folder(tmp_path / "coco"))
    counts = {e.what: (e.found, e.expected) for e in coco.entries}
    assert counts["instances_train2014.json: images"] == (5, None) and counts["val2014/"] == (3, 3)
    (tmp_path / "coco/val2014/COCO_val2014_000000000005.jpg").unlink()
    (missing,) = inventory(tmp_path / "coco").missing
    assert missing.what == "val2014/" and missing.how == "images.cocodataset.org/zips/val2014.zip"
    (tmp_path / "coco/val2014").rename(tmp_path / "coco/elsewhere")
    (missing,) = inventory(tmp_path / "coco").missing
    assert (missing.what, missing.found) == ("val2014/", 0)
    classes = inventory(write_images(tmp_path / "photos", ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]))
    assert {e.what: e.found for e in classes.entries} == {
        "images": 3, "cat/": 2, "dog/": 1, "masks/ (optional)": 0, "classes.txt (optional)": 0,
    }  # fmt: skip
    with pytest.raises(ToCoError, match="does not exist"):
        inventory(tmp_path / "nowhere")


@pytest.mark.parametrize("below", ["images", "images/train", "train", "."])
def test_the_folders_of_your_own_coco(tmp_path, below, capsys):
    """Whatever folder the reader takes, and nothing that is not MS COCO's comes from there."""
    root = write_coco_folder(tmp_path / "own", {"train": range(4), "val": (4, 5)})
    for split in ("train", "val"):
        folder = root / below.replace("train", split)
        folder.mkdir(parents=True, exist_ok=True)
        for path in (root / f"{split}2014").iterdir():
            path.rename(folder / path.name)
        (root / f"{split}2014").rmdir()
        (root / "annotations" / f"instances_{split}2014.json").rename(root / "annotations" / f"instances_{split}.json")
    assert len(open_source(root, "train", unlabelled=True)) == 4
    assert main([str(root), "--names-only"]) == 0
    told = capsys.readouterr().out
    assert "missing" not in told and "get:" not in told
    next(path for path in root.rglob("*.jpg") if "train2014" in path.name).unlink()
    (missing,) = inventory(root).missing
    assert (missing.what, missing.found, missing.expected, missing.how) == (f"{below}/", 3, 4, "")


def test_the_command(root, tmp_path, capsys):
    assert main([str(root)]) == 0
    told = capsys.readouterr().out
    assert "VOC, splits train, val" in told and "unreadable: 0" in told
    assert main([str(root), "--names-only"]) == 0 and "unreadable" not in capsys.readouterr().out
    (root / "JPEGImages" / "img_1.jpg").write_bytes(b"")
    assert main([str(root), "--split", "val"]) == 0
    assert main([str(root), "--split", "train"]) == 1 and "img_1.jpg is empty" in capsys.readouterr().out
    write_list(root, "bad", ["img_77"])
    assert main([str(root)]) == 1
    capsys.readouterr()
    assert main([str(tmp_path / "VOC2012")]) == 1
    assert f"{len(VOC_CLASSES) - 1} classes: VOCtrainval" in capsys.readouterr().out
    assert how_to_get("photos") == ""


def test_the_command_takes_a_test_part_without_masks(root, capsys):
    """It ended before it looked at any split."""
    save(root, 9, scene(83, 106, 1))  # image 1 again
    write_list(root, "val", ["img_6", "img_7"])
    write_list(root, "test", ["img_8"])
    (root / "SegmentationClass" / "img_8.png").unlink()
    assert main([str(root)]) == 0
    told = capsys.readouterr().out
    assert "test: 1 images, 0 masks, no image labels\n" in told and "train: 6 images, 6 masks, 0 of no" in told
    (root / "SegmentationClass" / "img_9.png").unlink()
    write_list(root, "test", ["img_8", "img_9"])
    assert main([str(root)]) == 1
    told = capsys.readouterr().out
    assert "leaks between splits: 1\n  test/img_9 = train/img_1\n" in told  # whether labels differ is not known
    save(root, 9, scene(107, 74, 9))
    assert main([str(root)]) == 1
    assert "unreadable: 1" in (told := capsys.readouterr().out) and "img_8.jpg has no mask to derive" in told
    write_list(root, "val", ["img_8"])
    assert main([str(root)]) == 1 and "img_8.jpg has no mask img_8.png" in capsys.readouterr().out


def test_the_command_looks_into_the_part_that_is_held_out(root, capsys):
    """Without a list for val a fifth of train is scored: one picture on both sides was a duplicate within train."""
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    write_list(root, "train", [f"img_{i}" for i in range(10)])
    parts = open_train_val(root)
    assert main([str(root)]) == 0
    told, (learned, held) = capsys.readouterr().out, (parts.train.names[0], parts.val.names[0])
    assert (learned, held) == ("img_1", "img_0")
    assert f"train: {len(parts.train)} images" in told and f"val (held out of train): {len(parts.val)} images" in told
    save(root, 0, scene(83, 106, 1))  # image 1 again
    assert main([str(root)]) == 1
    assert f"leaks between splits: 1\n  train/{learned} = val (held out of train)/{held}" in capsys.readouterr().out
    assert main([str(root), "--split", "train"]) == 0
    assert "duplicates within a split: 1\n  train/img_0 = train/img_1" in capsys.readouterr().out


def test_what_is_held_out_is_no_leak_into_longer_lists(root, capsys):
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    for longer in ("train", "trainval", "all"):
        write_list(root, longer, [f"img_{i}" for i in range(10)])
    assert main([str(root)]) == 0 and "leaks between splits: 0" in capsys.readouterr().out


def test_the_command_where_no_image_can_be_read(tmp_path, capsys):
    """The checker's own job ended in a ValueError of NumPy's."""
    for i in range(2):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{i}.jpg").write_bytes(b"no image")
    assert main([str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "unreadable: 2" in told and "cat/1.jpg is not a readable JPEG" in told


def test_a_deep_json_is_refused_by_the_inventory(tmp_path):
    root = write_coco_folder(tmp_path / "coco")
    path = root / "annotations" / "instances_train2014.json"
    path.write_text('{"images": [], "annotations": [], "categories": ' + "[" * 100_000)
    with pytest.raises(ToCoError, match="instances_train2014.json is not valid JSON"):
        inventory(root)
    path.write_text("[1]")
    with pytest.raises(ToCoError, match="instances_train2014.json is not COCO's JSON"):
        inventory(root)


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    write_images(tmp_path, ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"])
    monkeypatch.setenv("TOCO_LIMITS", "folder_entries=2")
    with pytest.raises(ToCoError, match="has 3 files and folders or more: at most 2 are read"):
        inventory(tmp_path)
