"""A result is of its data: corrected labels, a shorter list, other files or weights are told, a copy is the same."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_folder import write_coco_folder
from killed_training import config_of
from PIL import Image
from small_config import short_run
from test_interruptions import raise_interrupt, stop_at
from voc_folder import rectangle_mask, save_palette_mask, write_list, write_voc_folder

import toco_core.evaluation.scores as scoring
from toco_core.__main__ import main
from toco_core.config import RECIPES, TrainConfig, override, tiny
from toco_core.data import VOCFolder, fingerprint, open_data, open_source, scenes
from toco_core.data.fingerprint import differences, split_fingerprint
from toco_core.data.layouts.tags import write_tag_list
from toco_core.data.source import open_beside
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate
from toco_core.evaluation.scores import scored_run
from toco_core.model import ToCo
from toco_core.predict.export import export
from toco_core.runs.folder import Run, weights_hash
from toco_core.runs.opened import open_run
from toco_core.train.loop import train, trained_run

LATER = 1_900_000_000  # a time of files, seconds


@pytest.fixture
def root(tmp_path):
    return write_voc_folder(tmp_path / "data", n=5, splits={"train": range(4), "val": (4,)})


@pytest.fixture
def config(root, tmp_path):
    config = config_of(str(root), tmp_path / "runs")
    return override(config, steps=4, eval_interval=2, seg_start=1, energy_start=1, val_split="val")


def relabel(root, number=1):
    """Another class in the mask of one image, of the same size; its image-level label follows."""
    path = root / "SegmentationClass" / f"img_{number}.png"
    height, width = np.asarray(Image.open(path)).shape
    save_palette_mask(rectangle_mask(height, width, 3), path)


def repaint(root, number=1):
    """Another photograph of the same size; names and labels stay."""
    path = root / "JPEGImages" / f"img_{number}.jpg"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path, quality=95)


# ---- the fingerprint


CHANGES = {
    "labels": (lambda root: relabel(root), ["other image-level labels", "other masks"]),
    "a mask": (lambda root: save_palette_mask(np.full((33, 21), 2, np.uint8), root / "SegmentationClass/img_1.png"),
               ["other masks"]),
    "an image": (lambda root: repaint(root), ["other contents of image files"]),
    "a shorter list": (lambda root: write_list(root, "train", ["img_0", "img_2", "img_3"]), ["3 images, not 4"]),
    "another order": (lambda root: write_list(root, "train", ["img_1", "img_0", "img_2", "img_3"]),
                      ["other images or another order", "other image-level labels", "other contents of image files",
                       "other masks"]),
    "class names": (lambda root: (root / "classes.txt").write_text("background\ncat\nwolf\nsheep\n"),
                    ["other classes"]),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("with_known", [False, True])
def test_each_change_has_its_word(root, change, with_known):
    act, words = CHANGES[change]
    known = json.loads(json.dumps(split_fingerprint(VOCFolder(root, "train"))))
    assert differences(known, split_fingerprint(VOCFolder(root, "train"), known)) == []
    act(root)
    found = split_fingerprint(VOCFolder(root, "train"), known if with_known else None)
    assert differences(known, found) == words


def test_a_copy_is_the_same_data(root, tmp_path):
    known = split_fingerprint(VOCFolder(root, "train"))
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*.*g"):
        os.utime(path, (LATER, LATER))
    assert differences(known, split_fingerprint(VOCFolder(tmp_path / "copy", "train"), known)) == []


def test_untouched_files_are_not_read_again(root, monkeypatch):
    known = split_fingerprint(VOCFolder(root, "train"))
    monkeypatch.setattr(fingerprint, "_content", lambda *_: pytest.fail("a file is read"))
    monkeypatch.setattr(VOCFolder, "mask", lambda *_: pytest.fail("a mask is read"))
    assert split_fingerprint(VOCFolder(root, "train"), known) == known
    os.utime(root / "JPEGImages" / "img_2.jpg", (LATER, LATER))
    with pytest.raises(pytest.fail.Exception):
        split_fingerprint(VOCFolder(root, "train"), known)


def test_all_of_an_uncompressed_file_counts(tmp_path):
    """As long as before, both ends as before, one byte in the middle changed; of a PNG its checksums would differ."""
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    picture = np.zeros((300, 200, 3), np.uint8)
    for name in ("a", "b"):
        Image.fromarray(picture).save(tmp_path / "photos" / "cat" / f"{name}.bmp")
    known = split_fingerprint(open_source(tmp_path / "photos"))
    assert (tmp_path / "photos/cat/a.bmp").stat().st_size > 4 * fingerprint.END
    picture[150, 100, 1] = 9
    Image.fromarray(picture).save(tmp_path / "photos" / "cat" / "b.bmp")
    found = split_fingerprint(open_source(tmp_path / "photos"), known)
    assert differences(known, found) == ["other contents of image files"]


def test_annotations_count_as_masks(tmp_path):
    root = write_coco_folder(tmp_path / "coco")
    known = split_fingerprint(open_source(root, "train"))
    path = next((root / "annotations").glob("*train*.json"))
    content = json.loads(path.read_text())
    polygons = [a["segmentation"] for a in content["annotations"] if isinstance(a["segmentation"], list)]
    polygons[0][0][0] += 1.0
    path.write_text(json.dumps(content))
    assert differences(known, split_fingerprint(open_source(root, "train"), known)) == ["other masks"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in the file system")
def test_a_pipe_does_not_stop_it(root):
    source = VOCFolder(root, "train")
    (root / "JPEGImages" / "img_0.jpg").unlink()
    known = split_fingerprint(source)
    os.mkfifo(root / "JPEGImages" / "img_0.jpg")
    assert differences(known, split_fingerprint(source)) == ["other contents of image files"]


def test_what_the_package_draws_is_the_same_on_every_machine(tmp_path, monkeypatch):
    small = scenes.ScenesConfig(n_train=4, n_val=2, n_test=1)
    found = []
    for machine in ("one", "two"):
        monkeypatch.setenv("TOCO_CACHE", str(tmp_path / machine))
        root = scenes.scenes_folder(small, progress=False)
        if machine == "two":  # another processor, another last bit
            for path in root.rglob("*.*g"):
                Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
                os.utime(path, (LATER, LATER))
        found.append(split_fingerprint(VOCFolder(root, "train")))
    assert found[0] == found[1] and found[0]["drawing"] == root.name
    assert not {"images", "masks", "labels", "images_as_of"} & set(found[0])
    other = scenes.scenes_folder(scenes.ScenesConfig(seed=1, n_train=4, n_val=2, n_test=1), progress=False)
    assert differences(found[0], split_fingerprint(VOCFolder(other, "train"))) == [
        "another drawing of the embedded data set"
    ]
    shutil.copytree(root, tmp_path / "mine" / root.name)
    assert "drawing" not in split_fingerprint(VOCFolder(tmp_path / "mine" / root.name, "train"))
    given = VOCFolder(root, "train", labels={name: [1] * 8 for name in VOCFolder(root, "train").names})
    assert "labels" in split_fingerprint(given)


def test_labels_that_were_given_are_not_those_of_the_masks(root):
    given = VOCFolder(root, "train", labels={f"img_{i}": [1, 1, 1] for i in range(4)})
    known = split_fingerprint(given)
    assert differences(known, split_fingerprint(given, known)) == []
    found = split_fingerprint(VOCFolder(root, "train"), known)
    assert differences(known, found) == ["other image-level labels"]


# ---- runs


def says(words):
    return pytest.raises(ToCoError, match=rf"was trained on something else: {words}; train\(\.\.\., resume=False\)")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (relabel, "train has other image-level labels, train has other masks"),
        (repaint, "train has other contents of image files"),
        (lambda root: write_list(root, "train", ["img_0", "img_1"]), "train has 2 images, not 4"),
        (lambda root: repaint(root, 4), "val has other contents of image files"),
    ],
)
def test_a_run_of_other_data_is_refused(config, root, finished, change, words):
    if finished:
        first = train(config, progress=False)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(config, on_record=stop_at(3, raise_interrupt), progress=False)
    change(root)
    run = Run.of(config)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with says(words):
        train(config, progress=False)
    with says(words):
        trained_run(config, progress=False)
    with says(words):
        open_run(run.folder, data=open_data(config.data))
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    open_run(run.folder)  # to look into an old model is allowed
    again = train(config, resume=False, progress=False)
    assert not finished or weights_hash(again.model) != weights_hash(first.model) or "val" in words
    train(config, progress=False)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cat wolf sheep", "lacks dog and has wolf"),
        ("cat sheep dog", "has them in another order"),
        ("cat dog sheep cow", "has cow"),
        ("cat sheep", "lacks dog"),
    ],
)
def test_a_run_of_other_classes_is_not_opened(config, root, names, words):
    run = train(override(config, steps=1, warmup_steps=0), progress=False).run
    open_run(run.folder)
    (root / "classes.txt").write_text("\n".join(["background", *names.split()]))
    message = f"was trained on other classes: .*data {words} today; name and order them as then"
    with pytest.raises(ToCoError, match=message):
        open_run(run.folder)
    if names.count(" ") == 2:  # of runs that do not tell their classes, the number is compared
        for path, content in (("manifest.json", '{"data": {"train": 4}}'), ("manifest.json", "{}")):
            (run.folder / path).write_text(content)
            open_run(run.folder)
        (run.folder / "manifest.json").unlink()
        open_run(run.folder)


def test_a_renamed_tag_gives_no_labels_under_another_name(config, tmp_path):
    """The sorted classes had other places, and each label map was of another class than its number said."""
    splits = {name: VOCFolder(tmp_path / "data", name) for name in ("train", "val")}
    photos = write_tag_list(tmp_path / "photos", splits, masks=["val"])
    (photos.parent / "classes.txt").unlink()
    config = override(config, dataset=str(photos), steps=1, warmup_steps=0)
    run = train(config, progress=False).run
    photos.write_text(photos.read_text().replace("sheep", "aries"))
    for command in (["export", str(run.folder), str(tmp_path / "labels")], ["evaluate", str(run.folder)]):
        with pytest.raises(SystemExit, match="error: .*tags.csv lacks sheep and has aries today"):
            main(command)
    assert not (tmp_path / "labels").exists()
    photos.write_text(photos.read_text().replace("aries", "sheep"))
    assert main(["export", str(run.folder), str(tmp_path / "labels"), "--method", "cam"]) == 0


def test_another_part_with_other_classes_is_refused(tmp_path):
    root = write_coco_folder(tmp_path / "coco", {"train": range(4), "val": (4, 5), "test": (6, 7)})
    path = next((root / "annotations").glob("*test*.json"))
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "wolf"
    path.write_text(json.dumps(content))
    with pytest.raises(ToCoError, match="coco: train has the classes .* but test has .*wolf"):
        open_beside(open_source(root, "train"), "test")


def test_other_weights_in_the_same_file_are_refused(config, tmp_path):
    file = tmp_path / "encoder.pth"
    encoder = ToCo(config.model, 3).encoder
    torch.save(encoder.state_dict(), file)
    config = override(config, pretrained=True, weights=str(file))
    train(config, progress=False)
    train(config, progress=False)
    for parameter in encoder.parameters():
        parameter.data.add_(1.0)
    torch.save(encoder.state_dict(), file)
    for again in (train, trained_run, scored_run):
        with says("the file .*encoder.pth has other weights"):
            again(config, progress=False)
    file.unlink()
    trained_run(config, progress=False)  # nothing needs it any more


@pytest.mark.parametrize("finished", [True, False])
def test_a_config_that_was_edited_is_refused(config, finished):
    """Its folder's name told of the values of before, its config.json of others: both were believed."""
    if finished:
        train(config, progress=False)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(config, on_record=stop_at(3, raise_interrupt), progress=False)
    path = Run.of(config).folder / "config.json"
    was = json.loads(path.read_text())
    path.write_text(json.dumps(was | {"loss": was["loss"] | {"ptc": 9.0}, "seed": 7}))
    for again in (train, trained_run, scored_run):
        with pytest.raises(ToCoError, match=f"{path} was edited: ptc = 9.0 is not .*, seed = 7 is not 0; train"):
            again(config, progress=False)
    path.write_text(json.dumps(was | {"log_interval": 3, "out_dir": "elsewhere"}))  # these name no run
    train(config, progress=False)
    path.unlink()  # nothing is left to compare
    train(config, progress=False)


def test_runs_of_before_are_compared_by_names_and_labels(config, root):
    run = train(config, progress=False).run
    manifest = run.manifest()
    del manifest["fingerprint"]
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    train(config, progress=False)
    relabel(root)
    with says("names or image-level labels are others"):
        train(config, progress=False)
    write_list(root, "train", ["img_0"])
    with says("train has 1 images, not 4"):
        train(config, progress=False)
    (run.folder / "manifest.json").unlink()
    train(config, progress=False)


def test_the_same_relative_folder_twice_is_two_runs(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCO_RUNS", str(tmp_path / "shared"))
    config, found = override(config, dataset="data", out_dir=TrainConfig().out_dir, steps=1, warmup_steps=0), []
    for number, user in enumerate(("alice", "bob")):
        write_voc_folder(tmp_path / user / "data", n=5, splits={"train": range(number, 4), "val": (4,)})
        monkeypatch.chdir(tmp_path / user)
        found.append(train(config, progress=False))
        assert Run.of(config).folder == found[-1].run.folder
    assert found[0].run.folder != found[1].run.folder and len(found[1].data.train) == 3
    spellings = ["data", "data/", "../bob/data", str(tmp_path / "bob" / "data"), "./data"]
    assert {Run.of(override(config, dataset=spelling)).folder for spelling in spellings} == {found[1].run.folder}
    (tmp_path / "link").symlink_to(tmp_path / "bob" / "data")
    assert Run.of(override(config, dataset=str(tmp_path / "link"))).folder == found[1].run.folder


def test_fields_that_move_no_bit_name_no_run(config):
    for free in ({"workers": 3}, {"cache": True}, {"log_interval": 7}, {"log_to": "tensorboard"}, {"accumulate": 2}):
        assert override(config, **free).short_hash() == config.short_hash(), free
        assert override(tiny(), **free).short_hash() == tiny().short_hash(), free
    for counts in ({"device": "auto"}, {"precision": "bf16"}, {"eval_interval": 3}, {"seed": 4}, {"batch_size": 4}):
        assert override(config, **counts).short_hash() != config.short_hash(), counts
    with pytest.raises(KeyboardInterrupt):
        train(override(config, workers=1), on_record=stop_at(3, raise_interrupt), progress=False)
    seen = []
    train(config, on_record=seen.append, progress=False)
    assert seen[0]["step"] == 2  # it went on
    opened = trained_run(override(config, log_interval=3), progress=False)
    assert opened.config.log_interval == 3 and opened.run.folder == Run.of(config).folder


def test_names_of_runs_have_not_changed():
    """As of the version before `named`: the records of experiments and everybody's folders go by them."""
    known = {"voc": "3fdb239269", "coco": "a9a6c9a576", "tiny": "83686cf8b7", "photographs": "1c3727260d"}
    assert {name: recipe().short_hash() for name, recipe in RECIPES.items()} == known
    assert TrainConfig().short_hash() == "7ef0e86049"
    earlier = {"warm_start_steps": 400, "aux_pooling": None, "decoder_dilation": 2, "beta_l": 0.2, "beta_h": 0.45}
    before = override(tiny(), **earlier)  # as the recipe was
    assert before.short_hash() == "8957cb4f8b"
    assert override(before, seed=3, ptc=0.0, layer=9).short_hash() == "230855d018"


def test_folders_of_before_are_found(config, tmp_path, monkeypatch):
    """Named by the path as it was written, with the fields that move no bit."""
    monkeypatch.chdir(tmp_path)
    config = override(config, dataset="data", workers=1, log_interval=2, steps=1, warmup_steps=0)
    trained = train(config, progress=False)
    old = trained.run.folder.with_name(f"data-layer1-seed0-{config.short_hash(every_field=True)}")
    assert old != trained.run.folder
    trained.run.folder.rename(old)
    assert Run.of(config).folder == old
    assert trained_run(config, progress=False).run.folder == old and [*old.parent.iterdir()] == [old]


# ---- kept evaluations, exports, scores


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return ToCo(config.model, 3).eval()


def test_a_kept_evaluation_is_of_its_images_and_masks(model, root, tmp_path):
    def kept():
        return evaluate(model, VOCFolder(root, "train"), size=24, keep=tmp_path / "kept", progress=False)

    kept()
    shutil.copytree(root, tmp_path / "again")
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "again", root, copy_function=shutil.copyfile)
    kept()  # a copy is the same data
    save_palette_mask(np.full((33, 21), 2, np.uint8), root / "SegmentationClass/img_1.png")
    with pytest.raises(ToCoError, match="kept holds an evaluation with another mask_files: choose a new folder"):
        kept()
    repaint(root)
    with pytest.raises(ToCoError, match="another image_files, mask_files: choose a new folder"):
        kept()


def test_an_export_is_of_its_images(model, root, config, tmp_path):
    def exported():
        return export(model, VOCFolder(root, "train"), tmp_path / "out", config, method="cam", progress=False)

    assert (exported().n_new, exported().n_new) == (4, 0)
    save_palette_mask(np.full((33, 21), 2, np.uint8), root / "SegmentationClass/img_1.png")
    assert exported().n_new == 0  # label maps are not made of masks
    repaint(root)
    with pytest.raises(ToCoError, match="out holds an export with another image_files: choose a new folder"):
        exported()


def test_scores_are_of_the_part_that_was_scored(config, root, monkeypatch):
    write_list(root, "test", ["img_2", "img_3"])
    config = override(config, steps=1, warmup_steps=0)
    first = scored_run(config, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "evaluate_as", lambda *_, **__: pytest.fail("it is computed again"))
            np.testing.assert_equal(scored_run(config, progress=False).scores._asdict(), first.scores._asdict())
    write_list(root, "test", ["img_4", "img_3"])  # neither train nor val
    with pytest.warns(UserWarning, match="is scored again: test has other images or another order"):
        second = scored_run(config, progress=False)
    assert second.scores.iou != first.scores.iou
    relabel(root)
    with says("train has other image-level labels, train has other masks"):
        scored_run(config, progress=False)


@pytest.mark.slow
def test_shipped_runs_open(tmp_path, monkeypatch):
    """A run on the embedded data set, trained elsewhere: other cache folder, other times, other last bits."""
    small, plain = scenes.ScenesConfig(n_train=4, n_val=2, n_test=2), scenes.scenes_folder
    monkeypatch.setattr(scenes, "scenes_folder", lambda config=None, **options: plain(config or small, progress=False))
    monkeypatch.setenv("TOCO_CACHE", str(tmp_path / "there"))
    folder = Path(short_run(tmp_path / "runs", 0))
    monkeypatch.setenv("TOCO_CACHE", str(tmp_path / "here"))
    for path in scenes.scenes_folder().rglob("*.*g"):
        os.utime(path, (LATER, LATER))
    config = Run(folder).config()
    assert trained_run(config, progress=False).run.folder == folder
    scored = scored_run(config, progress=False)
    shutil.rmtree(tmp_path / "there")
    assert scored_run(config, progress=False).scores.part == scored.scores.part == "test"


def test_annotations_are_written_out_in_digits_for_a_first_fingerprint_only(tmp_path, monkeypatch):
    """Of COCO it takes half a minute; every resumption would."""
    source = open_source(write_coco_folder(tmp_path / "coco"), "train")
    known = split_fingerprint(source)
    assert known["masks"] == "a9c106fe7b34e8ab99e68ccc80e801e1"  # as runs of earlier versions hold it
    written, plain = [], fingerprint._plain
    monkeypatch.setattr(fingerprint, "_plain", lambda value: written.append(value) or plain(value))
    assert split_fingerprint(source, known) == known and not written
    shape = next(shape for _, shape in source.mask_source(0)[1] if isinstance(shape, list))
    shape[0][0] += 1
    assert differences(known, split_fingerprint(source, known)) == ["other masks"] and written
