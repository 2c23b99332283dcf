import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_config import labelling_config, stirred_named
from voc_folder import CLASSES, SIZES, smooth_image, write_list, write_voc_folder

import toco_core.predict.label as labelling
from toco_core.__main__ import main
from toco_core.config import override
from toco_core.conventions import voc_palette
from toco_core.data import COCOFolder, VOCFolder, open_source, read_image
from toco_core.data.augment import resize
from toco_core.errors import ToCoError
from toco_core.predict.export import export
from toco_core.predict.label import LOG, find_photographs, label_photographs
from toco_core.predict.models import open_model
from toco_core.runs.hub import write_pretrained
from toco_core.train.loop import train
from toco_core.viz import label_over_image

TAGS = {"a": "cat;sheep", "sub/b": "dog", "c d": "cat;dog;sheep", "e": ""}


@pytest.fixture(scope="module")
def opened():
    return stirred_named(CLASSES)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i, name in enumerate(TAGS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_image(*SIZES[i], i)).save(folder / f"{name}.jpg", quality=95)
    return folder


def with_tags(folder, tags=TAGS):
    lines = [f"{name}.jpg,{tags[name]}" for name in tags]
    (folder / "tags.csv").write_text("\n".join(["file,tags", *lines]) + "\n")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return folder


def rows(folder):
    with open(folder / "photographs.csv", encoding="utf-8", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("method", ["par", "cam", "crf", "seg"])
def test_tagged_photographs_get_the_labels_of_an_export(opened, photos, tmp_path, method):
    with_tags(photos)
    source = open_source(photos)
    wanted = export(opened.model, source, tmp_path / "export", opened.config, method=method, progress=False).folder
    made = label_photographs(opened, photos, tmp_path / "out", method=method, threshold=1.0, progress=False)
    assert (made.n_photographs, made.n_new, made.skipped) == (4, 4, {})
    assert made.images_per_class == {"cat": 2, "dog": 2, "sheep": 2}
    back, exported = VOCFolder(made.folder, "train"), VOCFolder(wanted, "train")
    coco = COCOFolder(made.folder / "annotations" / "instances_train.json", unlabelled=True)
    assert sorted(back.names) == sorted(exported.names)
    for i, name in enumerate(back.names):
        np.testing.assert_array_equal(back.mask(i), exported.mask(exported.names.index(name)))
        np.testing.assert_array_equal(coco.mask(coco.names.index(name)), back.mask(i))
        np.testing.assert_array_equal(back.image(i), source.image(source.names.index(name)))
        assert (made.folder / "overlays" / f"{name}.jpg").is_file()
    if method != "seg":  # the decoder of this network says the same everywhere
        assert max(len(np.unique(back.mask(i))) for i in range(4)) > 2
    assert back.check().n_masks == 4


def test_without_tags_the_classifier_chooses(opened, photos, tmp_path):
    """Of one photograph at a time, at the size at which CAMs are made."""
    scores = {}
    for name in TAGS:
        image = torch.from_numpy(resize(read_image(photos / f"{name}.jpg"), 32, 32)).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = opened.model(opened.model.normalise(image.float() / 255)).class_logits
        scores[name] = logits[0].sigmoid().numpy()
    values = np.sort(np.concatenate(list(scores.values())))
    threshold = float(values[5:7].mean())
    assert values[5] < threshold < values[6]
    made = label_photographs(opened, photos, tmp_path / "out", method="cam", threshold=threshold, progress=False)
    table, back = rows(made.folder), VOCFolder(made.folder, "train")
    for i, name in enumerate(back.names):
        wanted = [CLASSES[k + 1] for k in np.flatnonzero(scores[name] > threshold)]
        row = table[f"{name}.jpg"]
        assert row["tags"] == ";".join(wanted) and row["chosen by"] == "classifier"
        np.testing.assert_allclose([float(row[c]) for c in CLASSES[1:]], scores[name], atol=1e-4)
        assert {CLASSES[k] for k in np.unique(back.mask(i)) if k} <= set(wanted)
    assert sum(made.images_per_class.values()) == 6
    with_tags(photos, {"a": "dog"})  # the others have no tags
    made = label_photographs(opened, photos, tmp_path / "mixed", method="cam", threshold=threshold, progress=False)
    assert (rows(made.folder)["a.jpg"]["tags"], rows(made.folder)["a.jpg"]["chosen by"]) == ("dog", "tags")
    assert rows(made.folder)["e.jpg"] == table["e.jpg"]
    made = label_photographs(opened, photos, tmp_path / "n", tags="none", threshold=threshold, progress=False)
    assert rows(made.folder) == table


def test_what_cannot_be_used_is_listed_and_skipped(opened, photos, tmp_path):
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:-30])
    (photos / "phone.HEIC").write_bytes(b"x")
    (photos / "._a.jpg").write_bytes(b"x")
    shutil.copy(photos / "a.jpg", photos / "a.jpeg")
    (photos / "masks").mkdir()
    shutil.copy(photos / "a.jpg", photos / "masks" / "m.jpg")
    made = label_photographs(opened, photos, photos / "out", method="cam", progress=False)
    again = label_photographs(opened, photos, photos / "out", method="cam", progress=False)
    assert (made.n_photographs, made.n_new, again.n_photographs, again.n_new) == (4, 4, 4, 0)
    reasons = {file.rpartition("/")[2]: reason for file, reason in made.skipped.items()}
    assert set(reasons) == {"broken.jpg", "phone.HEIC", "a.jpeg"} and again.skipped == made.skipped
    assert "is truncated" in reasons["broken.jpg"] and ".heic is not read" in reasons["phone.HEIC"]
    assert reasons["a.jpeg"] == "a.jpg has the same name"
    listed = (photos / "out" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 3 and all(str(photos) in line for line in listed)
    for path in photos.glob("*.jpg"):
        path.write_bytes(b"")
    shutil.rmtree(photos / "sub")
    with pytest.raises(ToCoError, match="none of the photographs .* can be used: .*a.jpg is empty"):
        label_photographs(opened, photos, tmp_path / "none", method="cam", progress=False)


def test_two_photographs_whose_suffixes_differ_in_capitals(photos):
    """One was dropped and nowhere listed."""
    for name in ("b.jpg", "b.JPG"):
        shutil.copy(photos / "a.jpg", photos / name)
    if not (photos / "b.jpg").samefile(photos / "b.JPG"):
        found = find_photographs(photos, CLASSES)
        assert [p.path.name for p in found.photographs if p.name == "b"] == ["b.JPG"]
        assert found.skipped == {str(photos / "b.jpg"): "b.JPG has the same name"}


def test_folders_that_programs_keep_for_themselves_hold_no_photographs(photos):
    for name in ("@eaDir/t.jpg", "sub/.thumbnails/t.jpg", "__MACOSX/._a.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        shutil.copy(photos / "a.jpg", photos / name)
    found = find_photographs(photos, CLASSES)
    assert [p.name for p in found.photographs] == ["a", "c d", "e", "sub/b"] and not found.skipped


@pytest.mark.parametrize("name", ["photo.webp", "photo.HEIC", "tags.txt", "photo"])
@pytest.mark.parametrize("tags", ["auto", "none"])
def test_a_file_of_another_kind_is_no_list_of_tags(photos, name, tags):
    """It was read as one, or the whole folder was labelled in its place."""
    (photos / name).write_text("file,tags\na.jpg,cat\n")
    words = r" is not read: .jpg, .jpeg, .png, .bmp are, and .csv, .tsv, .json as a list of tags$"
    with pytest.raises(ToCoError, match=f"^photographs = '{photos / name}'{words}"):
        find_photographs(photos / name, CLASSES, tags=tags)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_names_that_are_no_text_are_skipped_in_a_line_each(opened, photos, tmp_path):
    """All was labelled, and then no list was written."""
    for name in (b"caf\xe9.jpg", b"caf\xe9.heic", b"a\nb.jpg", b"broken.bmp"):
        shutil.copy(photos / "a.jpg", photos / os.fsdecode(name))
    (photos / "broken.bmp").write_bytes(b"")
    os.rename(photos, tmp_path / os.fsdecode(b"f\xeate"))
    made = label_photographs(opened, tmp_path / os.fsdecode(b"f\xeate"), tmp_path / "out", method="cam", progress=False)
    lines = (made.folder / "skipped.txt").read_text().splitlines()
    assert made.n_photographs == 4 and len(lines) == len(made.skipped) == 4
    for part in (
        r"f\udceate/caf\udce9.jpg: its name has characters that",
        r"a\nb.jpg: its name has characters",
    ):
        assert any(part in line for line in lines), lines


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("\ud800", r"names a class: '\\ud800' is no text in UTF-8"),
        ("a\nb", r"names the class 'a\\nb': one line"),
        ("", ""),
    ],
)
def test_a_class_that_is_no_line_of_text_is_refused(opened, tmp_path, name, message):
    """A line break made a class more of it in classes.txt."""
    names = ("background", "cat", name, "sheep")
    write_pretrained(tmp_path / "shared", opened.model.state_dict(), opened.config, names, "")
    with pytest.raises(ToCoError, match=f"run = '.*shared' {message}"):
        open_model(tmp_path / "shared")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_links_in_a_circle_pipes_and_devices_are_told(opened, photos, tmp_path):
    """They were a RuntimeError and a NotADirectoryError; a pipe that should hold the tags was left out silently."""
    for loop in (photos / "loop.jpg", tmp_path / "loop"):
        loop.symlink_to(loop)
    made = label_photographs(opened, photos, tmp_path / "out", method="cam", progress=False)
    assert made.n_photographs == 4 and list(made.skipped) == [str(photos / "loop.jpg")]
    assert "cannot be read" in made.skipped[str(photos / "loop.jpg")]
    for out in (tmp_path / "loop", tmp_path / "loop" / "below"):
        with pytest.raises(ToCoError, match=f"cannot write to {out}"):
            label_photographs(opened, photos, out, method="cam", progress=False)
    (photos / "masks").symlink_to("masks")
    with pytest.raises(ToCoError, match="photos/masks cannot be read"):
        find_photographs(photos, CLASSES)
    (photos / "masks").unlink()
    os.mkfifo(tmp_path / "pipe.jpg")
    for place, what in (
        (tmp_path / "pipe.jpg", "is a pipe or a device"),
        ("/dev/zero", "is a pipe"),
        ("x", "is not there"),
    ):
        with pytest.raises(ToCoError, match=f"photographs = '{place}' {what}"):
            find_photographs(place, CLASSES)
    os.mkfifo(photos / "tags.csv")
    with pytest.raises(ToCoError, match="tags.csv cannot be read: it is a pipe"):
        find_photographs(photos, CLASSES)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_photographs_that_may_not_be_read_are_named(opened, photos, tmp_path):
    photos.chmod(0)
    try:
        with pytest.raises(ToCoError, match="photos.* cannot be read: Permission denied"):
            label_photographs(opened, photos, tmp_path / "out", progress=False)
    finally:
        photos.chmod(0o700)


def test_an_interrupted_call_goes_on_and_a_later_one_labels_what_is_new(opened, photos, tmp_path, monkeypatch):
    with_tags(photos)
    whole = label_photographs(opened, photos, tmp_path / "whole", progress=False)
    write, written = labelling.write_label, []

    def failing(path, label):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, label)

    monkeypatch.setattr(labelling, "write_label", failing)
    with pytest.raises(KeyboardInterrupt, match=r"stopped: 2 of 4 photographs are in .*cut, and the same call goes on"):
        label_photographs(opened, photos, tmp_path / "cut", progress=False)
    monkeypatch.setattr(labelling, "write_label", write)
    with open(tmp_path / "cut" / "photographs.jsonl", "a") as log:
        log.write('{"name": "e", "file"')  # the power failed here
    rest = label_photographs(opened, photos, tmp_path / "cut", progress=False)
    assert rest.n_new == 2 and rest.images_per_class == whole.images_per_class
    for path in sorted(p for p in whole.folder.rglob("*") if p.is_file() and p.suffix != ".jsonl"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(whole.folder)).read_bytes(), path
    with_tags(photos, TAGS | {"sub/b": "cat"})
    Image.fromarray(smooth_image(12, 18, 9)).save(photos / "new.png")
    later = label_photographs(opened, photos, whole.folder, progress=False)
    assert (later.n_photographs, later.n_new) == (5, 2)
    assert rows(whole.folder)["sub/b.jpg"]["tags"] == "cat"
    with pytest.raises(ToCoError, match="holds a set of labels with another beta_l: choose a new folder"):
        label_photographs(opened, photos, whole.folder, beta_l=0.2, progress=False)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("par", {"cam_scales": (1.5, 3.0)}, "with another cam_scales"),
        ("par", {"par_iterations": 0, "par_dilations": (7,)}, "with another par_dilations, par_iterations"),
        ("par", {"attention_steps": 2}, "that says nothing of its attention_blocks, attention_kind, attention_steps"),
        ("seg", {"seg_scales": (0.5,)}, "with another seg_scales"),
        ("cam", {"precision": "bf16"}, "with another precision"),
        ("cam", {"par_iterations": 0, "seg_scales": (0.5,)}, ""),
    ],
)
def test_labels_of_other_settings_are_not_taken_for_these(opened, photos, tmp_path, method, changes, message):
    """A later call with other scales or another PAR found nothing to do."""
    options = {"method": method, "progress": False}
    assert label_photographs(opened, photos, tmp_path / "out", **options).n_new == 4
    changed = opened._replace(config=override(opened.config, **changes))
    if not message:
        assert label_photographs(changed, photos, tmp_path / "out", **options).n_new == 0
        return
    with pytest.raises(ToCoError, match=f"out holds a set of labels {message}: choose a new folder"):
        label_photographs(changed, photos, tmp_path / "out", **options)


def test_folders_of_older_versions_go_on_where_their_settings_are_known(opened, photos, tmp_path):
    """Those that an export did not write down follow from its weights; of a set of labels also the scales lacked."""
    options, out = {"method": "par", "progress": False}, tmp_path / "out"
    label_photographs(opened, photos, out, **options)
    manifest = json.loads((out / "manifest.json").read_text())

    def with_settings(*left_out):
        settings = {name: value for name, value in manifest["settings"].items() if name not in left_out}
        (out / "manifest.json").write_text(json.dumps(manifest | {"settings": settings}))

    with_settings("device", "precision", "network", "decoder_dilation")
    assert label_photographs(opened, photos, out, **options).n_new == 0
    assert json.loads((out / "manifest.json").read_text()) == manifest
    with_settings("cam_scales", "par_scale")
    with pytest.raises(
        ToCoError, match="says nothing of its cam_scales, par_scale: choose a new folder, or write them"
    ):
        label_photographs(opened, photos, out, **options)


@pytest.mark.parametrize(
    "entry",
    [{"classes": [4]}, {"classes": [0]}, {"classes": "abc"}, {"classes": None}, {"classes": [[1]]}, {"scores": 7}]
    + [{"scores": [0.5]}, {"scores": ["a", "b", "c"]}, {"name": ["a"]}, {"file": 5}, "[" * 100_000, "9" * 5000, "[]"],
)
def test_a_line_of_the_log_that_does_not_fit_is_of_no_photograph(opened, photos, tmp_path, entry):
    """It was an IndexError, a TypeError or a RecursionError."""
    made = label_photographs(opened, photos, tmp_path / "out", method="cam", progress=False)
    log, table = made.folder / "photographs.jsonl", rows(made.folder)
    first, *rest = log.read_text().splitlines()
    log.write_text(
        "\n".join([entry if isinstance(entry, str) else json.dumps(json.loads(first) | entry), *rest]) + "\n"
    )
    again = label_photographs(opened, photos, tmp_path / "out", method="cam", progress=False)
    assert again.n_new == 1 and rows(made.folder) == table


def test_the_list_of_what_is_done_follows_no_link(opened, photos, tmp_path):
    def label():
        return label_photographs(opened, photos, tmp_path / "out", method="cam", progress=False).n_new

    label()
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out" / LOG).unlink()
    (tmp_path / "out" / LOG).symlink_to(tmp_path / "mine")
    with pytest.raises(ToCoError, match=f"cannot write to .*{LOG}: "):
        label()
    assert (tmp_path / "mine").read_text() == "precious"
    (tmp_path / "out" / LOG).unlink()
    assert label() == len(TAGS)


def test_a_photograph_that_is_a_broken_link_now_is_skipped(opened, photos, tmp_path):
    def label():
        return label_photographs(opened, photos, tmp_path / "out", method="cam", progress=False)

    assert label().n_photographs == len(TAGS)
    (photos / "a.jpg").unlink()
    (photos / "a.jpg").symlink_to("nowhere.jpg")
    found = label()
    assert (found.n_photographs, found.n_new) == (len(TAGS) - 1, 0)
    assert found.skipped == {str(photos / "a.jpg"): f"{photos / 'a.jpg'} cannot be read: No such file or directory"}


@pytest.mark.parametrize(
    ("method", "part"), [("cam", "encoder"), ("par", "classifier"), ("seg", "decoder"), ("seg_crf", "decoder")]
)
def test_weights_that_are_no_numbers_label_nothing(photos, tmp_path, method, part):
    broken = stirred_named(CLASSES)
    for parameter in getattr(broken.model, part).parameters():
        parameter.data[...] = torch.nan
    with pytest.raises(ToCoError, match=r"^the network gives NaN or infinite scores: .* precision = 'fp32'"):
        label_photographs(broken, photos, tmp_path / "out", method=method, progress=False)
    assert not list((tmp_path / "out" / "SegmentationClass").iterdir())


def test_names_with_two_suffixes_are_read_back(opened, photos, tmp_path):
    (photos / "a.jpg").rename(photos / "a.png.jpg")
    (photos / "e.jpg").rename(photos / "a.jpg")
    out = label_photographs(opened, photos, tmp_path / "out", progress=False).folder
    back = VOCFolder(out, "train")
    assert back.names == ("a", "a.png", "c d", "sub/b") and back.check(progress=False).n_masks == 4
    coco = COCOFolder(out / "annotations" / "instances_train.json", unlabelled=True)
    assert sorted(coco.names) == sorted(back.names)


@pytest.mark.parametrize("images", ["copy", "link", "none"])
def test_a_photograph_that_has_changed_takes_the_place_of_the_one_before(opened, photos, tmp_path, images, monkeypatch):
    """Of its own suffix or of another one, also where the call is cut between the label and the picture."""
    out = label_photographs(opened, photos, tmp_path / "out", progress=False).folder
    pictures = out / "JPEGImages"
    untouched = (pictures / "e.jpg").stat().st_mtime_ns
    for path in (photos / "a.jpg", photos / "sub" / "b.png"):
        path.unlink(missing_ok=True)
        Image.fromarray(smooth_image(13, 19, 40)).save(path)
    (photos / "sub" / "b.jpg").unlink()

    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(labelling, "place_image", cut)
        patched.setattr(labelling, "remove_image", cut, raising=False)
        label_photographs(opened, photos, out, progress=False, images=images)
    assert (pictures / "sub" / "b.jpg").is_file()  # the old one stays until the new one is there
    assert label_photographs(opened, photos, out, progress=False, images=images).n_new == 2
    left = {path.relative_to(pictures).as_posix() for path in pictures.rglob("*.*")}
    assert left == {"c d.jpg", "e.jpg"} | ({"a.jpg", "sub/b.png"} if images != "none" else set())
    assert (pictures / "e.jpg").stat().st_mtime_ns == untouched
    if images != "none":
        back = VOCFolder(out, "train")
        for i, name in enumerate(back.names):
            np.testing.assert_array_equal(back.image(i), read_image(next(photos.glob(f"{name}.*"))))
        assert back.check(progress=False).smallest == (13, 19)


def test_a_folder_per_class_is_tags_where_it_has_the_names_of_classes(photos):
    for name, folder in (("x", "cat"), ("y", "background"), ("z", "dog/deep")):
        (photos / folder).mkdir(parents=True)
        Image.fromarray(smooth_image(12, 18, 9)).save(photos / folder / f"{name}.jpg")
    shutil.rmtree(photos / "sub")
    found = {p.name: p.classes for p in find_photographs(photos, CLASSES).photographs}
    assert found == {"a": None, "c d": None, "e": None, "cat/x": (1,), "background/y": (), "dog/deep/z": (2,)}
    (photos / "horse").mkdir()
    shutil.copy(photos / "a.jpg", photos / "horse" / "h.jpg")
    with pytest.raises(ToCoError, match="the folder 'horse' is no class of the model, which has cat, dog, sheep"):
        find_photographs(photos, CLASSES)
    assert all(p.classes is None for p in find_photographs(photos, CLASSES, tags="none").photographs)
    one = find_photographs(photos / "a.jpg", CLASSES).photographs
    assert [(p.name, p.classes) for p in one] == [("a", None)]


def test_folders_with_other_names_are_folders(photos):
    found = find_photographs(photos, CLASSES)
    assert [p.name for p in found.photographs] == ["a", "c d", "e", "sub/b"]
    assert all(p.classes is None for p in found.photographs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method = 'magic' is not allowed: one of cam, par"),
        ({"tags": "all"}, "tags = 'all' is not allowed: one of auto, none"),
        ({"threshold": 2}, "threshold = 2 is not allowed: 0 to 1"),
        ({"beta_l": 0.7}, "beta_l"),
        ({"split": "../../../escaped"}, "split: '../../../escaped' is not a name inside the lists of splits"),
        ({"split": ""}, "split: '' is not a name inside"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(opened, photos, tmp_path, options, message):
    with pytest.raises(ToCoError, match=message):
        label_photographs(opened, photos, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "file"), [("label-studio", "label_studio.json"), ("cvat", "cvat.zip")])
def test_the_command_writes_for_the_tools_that_correct(opened, photos, tmp_path, capsys, kind, file):
    write_pretrained(tmp_path / "shared", opened.model.state_dict(), opened.config, CLASSES, "")
    arguments = ["label", str(tmp_path / "shared"), str(photos), str(tmp_path / "out"), "--method", "cam"]
    assert main([*arguments, "--format", kind]) == 0
    assert f"{tmp_path / 'out' / file}\n" in capsys.readouterr().out
    assert (tmp_path / "out" / file).stat().st_size > 0


@pytest.mark.slow
def test_the_command_needs_no_data_set(photos, tmp_path, capsys):
    root = write_voc_folder(tmp_path / "voc", n=4)
    write_list(root, "val", ["img_3"])
    config = override(labelling_config(), dataset=str(root), steps=1, warmup_steps=0, batch_size=2)
    run = train(override(config, out_dir=str(tmp_path)), progress=False).run
    shutil.rmtree(root)
    assert open_model(run.folder).class_names == CLASSES and open_model(run.folder).step == 1
    arguments = ["label", str(run.folder), str(photos), str(tmp_path / "out"), "--method", "par", "--beta-h", "0.65"]
    assert main([*arguments, "--threshold", "0.1"]) == 0
    told = capsys.readouterr().out
    assert "4 photographs with labels, 4 of them new" in told and "cat " in told
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["beta_l"], settings["beta_h"], settings["threshold"]) == (0.35, 0.65, 0.1)
    for wrong in (["label", "nowhere", str(photos), "x"], ["label", str(run.folder), "nowhere", str(tmp_path / "x")]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert "'nowhere'" in str(stop.value) and "\n" not in str(stop.value)


def test_an_overlay_leaves_the_background_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    label = np.zeros((20, 30), np.uint8)
    label[5:12, 6:19], label[15:, 20:] = 3, 255
    picture = label_over_image(image, label, {3: "sheep 0.98"}, strength=0.5)
    assert picture.shape[1] == 30 and picture.shape[0] > 20
    np.testing.assert_array_equal(picture[:5], image[:5])
    inside = (slice(7, 11), slice(8, 17))
    wanted = (image[inside] + voc_palette()[3].astype(float)) / 2
    np.testing.assert_allclose(picture[inside], wanted, atol=1)
    assert (picture[20:] == voc_palette()[3]).all(-1).sum() > 100  # the square of its colour below
    large = label_over_image(np.zeros((300, 200, 3), np.uint8), np.zeros((300, 200), np.uint8), {}, side=150)
    assert large.shape[1] == 100
