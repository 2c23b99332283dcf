"""The second network from a shell: edited label maps in, a folder out that `toco label` takes."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from killed_training import config_of
from voc_folder import CLASSES, smooth_image, write_voc_folder

from toco_core.__main__ import main
from toco_core.analysis import second_stage
from toco_core.analysis.second_stage import train_segmentation
from toco_core.commands.export import export_command as export
from toco_core.config import override
from toco_core.data import VOCFolder, read_mask
from toco_core.data.files import palette_png, picture_bytes
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.evaluation.scores import score_run
from toco_core.predict.class_maps import cams
from toco_core.predict.label import label_photographs
from toco_core.predict.models import open_model
from toco_core.runs.folder import Run, as_json
from toco_core.runs.hub import save_pretrained
from toco_core.runs.opened import open_run
from toco_core.train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    data = write_voc_folder(folder / "data", n=6)
    return train(override(config_of(str(data), folder / "runs"), steps=3, eval_interval=0), progress=False).run


def test_edited_labels_reach_the_second_network(run, tmp_path, capsys):
    labels = tmp_path / "labels"
    assert export([str(run.folder), str(labels), "--method", "cam", "--beta", "0.4"]) == 0
    before = train_segmentation(run.config(), VOCFolder(labels, "train"), steps=2, progress=False)
    for path in (labels / "SegmentationClass").glob("*.png"):  # all of it a dog
        path.write_bytes(palette_png(np.full_like(read_mask(path), 2)))
    command = ["second", str(run.folder), str(labels), str(tmp_path / "second"), "--steps", "2"]
    assert main(command) == 0
    opened = open_model(tmp_path / "second")
    expected = train_segmentation(run.config(), VOCFolder(labels, "train"), steps=2, progress=False)
    assert opened.class_names == CLASSES and opened.name == "second"
    for name, value in expected.state_dict().items():
        assert torch.equal(value, opened.model.state_dict()[name]), name
    assert any(not torch.equal(v, before.state_dict()[n]) for n, v in expected.state_dict().items())
    command = ["label", str(tmp_path / "second"), str(labels / "JPEGImages"), str(tmp_path / "new"), "--method", "seg"]
    assert main(command) == 0
    assert len(list((tmp_path / "new" / "SegmentationClass").glob("*.png"))) == 6


def test_a_folder_that_cannot_be_written_is_told_before_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr("toco_core.commands.second.train_segmentation", lambda *a, **k: pytest.fail("it trained"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: cannot write to .*file/second: Not a directory"):
        main(["second", str(run.folder), run.config().data.dataset, str(tmp_path / "file" / "second")])


BROKEN = {  # what an editor left, and how it is told
    "a value": (lambda mask: palette_png(np.full_like(mask, 12)), r"holds the value 12: allowed are 0\.\.3"),
    "colours": (lambda mask: picture_bytes(np.dstack([mask] * 3)), r"is a colour image \(RGB\)"),
    "a size": (lambda mask: palette_png(mask[1:]), r"a mask has the size of its image"),
    "a cut": (lambda mask: palette_png(mask)[:-20], "is truncated"),
}


@pytest.fixture
def labels(run, tmp_path):
    return shutil.copytree(run.config().data.dataset, tmp_path / "labels")


@pytest.mark.parametrize("what", BROKEN)
def test_a_label_map_that_cannot_be_used_is_told_before_the_first_step(run, labels, tmp_path, monkeypatch, what):
    """In the last image of an order that one step does not come to."""
    monkeypatch.setattr(second_stage, "build_training", lambda *_, **__: pytest.fail("it trained"))
    spoil, words = BROKEN[what]
    path = labels / "SegmentationClass" / "img_5.png"
    path.write_bytes(spoil(read_mask(path)))
    with pytest.raises(SystemExit, match=rf"error: .*img_5\.png.*{words}"):
        main(["second", str(run.folder), str(labels), str(tmp_path / "second"), "--steps", "1"])


def stop_after(steps, action, monkeypatch):
    """`action` after so many batches were drawn, before the next step begins."""
    plain = second_stage._batch

    def batch(source, config, step):
        if step == steps:
            action()
        return plain(source, config, step)

    monkeypatch.setattr(second_stage, "_batch", batch)


def press_ctrl_c():
    raise KeyboardInterrupt


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("finished_before", [False, True])
def test_what_was_stopped_goes_on_with_the_same_bits(run, labels, tmp_path, monkeypatch, capsys, finished_before):
    command = ["second", str(run.folder), str(labels), str(tmp_path / "second"), "--steps"]
    assert main(["second", str(run.folder), str(labels), str(tmp_path / "whole"), "--steps", "5"]) == 0
    whole = contents(tmp_path / "whole")
    assert not finished_before or main([*command, "1"]) == 0
    with monkeypatch.context() as patch:
        stop_after(3, press_ctrl_c, patch)
        assert main([*command, "5"]) == 130
    assert "the checkpoint after step 3 is in" in capsys.readouterr().err
    assert [*contents(tmp_path / "second")].count("training/checkpoint.pt") == 1
    with monkeypatch.context() as patch:
        images = labels / "JPEGImages"
        stop_after(4, lambda: images.rename(tmp_path / "away"), patch)
        words = r"img_\d\.jpg cannot be read.*; the checkpoint after step 4 is in .* there once the file is as it was$"
        with pytest.raises(SystemExit, match=words):
            main([*command, "5"])
    (tmp_path / "away").rename(images)
    drawn, plain = [], second_stage._batch
    monkeypatch.setattr(second_stage, "_batch", lambda *args: drawn.append(args[2]) or plain(*args))
    assert main([*command, "5"]) == 0
    assert drawn == [4] and contents(tmp_path / "second") == whole
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_what_goes_wrong_at_the_end_loses_no_step(run, labels, tmp_path, monkeypatch):
    command = ["second", str(run.folder), str(labels), str(tmp_path / "second"), "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("toco_core.commands.second.write_pretrained", lambda *_: (_ for _ in ()).throw(ToCoError("full")))
        with pytest.raises(SystemExit, match="error: full"):
            main(command)
    monkeypatch.setattr(second_stage, "_batch", lambda *_: pytest.fail("it trained"))
    assert main(command) == 0 and open_model(tmp_path / "second").class_names == CLASSES


def test_a_checkpoint_of_another_training_is_refused(run, labels, tmp_path, monkeypatch):
    command = ["second", str(run.folder), str(labels), str(tmp_path / "second"), "--steps"]
    with monkeypatch.context() as patch:
        stop_after(1, press_ctrl_c, patch)
        assert main([*command, "3"]) == 130
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is of a training with other steps: remove it to begin anew"):
        main([*command, "4"])
    path = labels / "SegmentationClass" / "img_2.png"
    path.write_bytes(palette_png(np.full_like(read_mask(path), 1)))
    with pytest.raises(SystemExit, match=r"is of a training with other masks: remove it"):
        main([*command, "3"])
    with pytest.raises(ToCoError, match=r"is of a training with other config, steps, names, classes, images, masks"):
        train_segmentation(run.config(), VOCFolder(labels, "train"), steps=3, progress=False, folder=run.folder)
    (tmp_path / "second" / "training" / "checkpoint.pt").unlink()
    assert main([*command, "3"]) == 0


def test_checkpoints_come_by_the_clock(run, labels, tmp_path, monkeypatch):
    saved, plain = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run, state, **which: saved.append(state["step"]) or plain(run, state))
    source, options = VOCFolder(labels, "train"), {"steps": 3, "progress": False}
    train_segmentation(run.config(), source, folder=tmp_path / "often", save_minutes=0.0, **options)
    train_segmentation(run.config(), source, folder=tmp_path / "rarely", **options)
    train_segmentation(run.config(), source, **options)
    assert saved == [1, 2, 3, 3]


def test_a_folder_of_yours_called_training_is_left_alone(run, labels, tmp_path):
    (tmp_path / "second" / "training").mkdir(parents=True)
    (tmp_path / "second" / "training" / "a.jpg").write_text("mine")
    with pytest.raises(SystemExit, match="holds other files"):
        main(["second", str(run.folder), str(labels), str(tmp_path / "second"), "--steps", "1"])
    assert (tmp_path / "second" / "training" / "a.jpg").read_text() == "mine"


@pytest.fixture(scope="module")
def second(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "second"
    assert main(["second", str(run.folder), run.config().data.dataset, str(folder), "--steps", "1"]) == 0
    return folder


def test_its_config_says_what_taught_it(run, second):
    config = open_model(second).config
    loss, before = config.loss, run.config()
    assert (loss.cls, loss.aux_cls, loss.ptc, loss.ctc, loss.energy) == (0, 0, 0, 0, 0) and loss.seg > 0
    assert config.model == before.model and config.schedule == before.schedule


def test_a_run_with_maps_that_must_be_learned_has_a_second_network(run, tmp_path):
    """A second network learns no affinity: its config was refused, after it had been trained."""
    learned = {"affinity": 0.1, "attention_steps": 1, "attention_blocks": (2,), "attention_kind": "learned"}
    mapped = {"class_tokens_after": 1, "class_tokens": 1.0, "class_attention": 0.5}
    config = override(run.config(), **learned, **mapped, steps=1, out_dir=str(tmp_path / "runs"))
    first = train(config, progress=False).run
    assert main(["second", str(first.folder), config.data.dataset, str(tmp_path / "second"), "--steps", "1"]) == 0
    opened = open_model(tmp_path / "second")
    assert opened.config.loss.affinity == 0 and opened.config.labels == config.labels
    assert main(["evaluate", str(tmp_path / "second"), "--data", config.data.dataset]) == 0


def test_it_labels_by_its_segmentation(run, second, tmp_path):
    """Its classifiers are as they began: by default they chose classes, and their CAMs made the label maps."""
    photos = f"{run.config().data.dataset}/JPEGImages"
    for method in ([], ["--method", "seg"]):
        assert main(["label", str(second), photos, str(tmp_path / "_".join(["by", *method])), *method]) == 0
    made, wanted = (sorted((tmp_path / by / "SegmentationClass").iterdir()) for by in ("by", "by_--method_seg"))
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in wanted] and len(made) == 6
    with open(tmp_path / "by" / "photographs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, path in zip(rows, made, strict=True):
        shown = [CLASSES[k] for k in np.unique(read_mask(path)) if 0 < k < 255]
        assert row["tags"] == ";".join(shown) and row["chosen by"] == "segmentation"
        assert [row[name] for name in CLASSES[1:]] == ["", "", ""]
    again = label_photographs(str(second), photos, tmp_path / "by", progress=False)
    assert (again.n_photographs, again.n_new) == (6, 0)


def test_what_needs_its_classifiers_is_refused(run, second, tmp_path):
    photos = f"{run.config().data.dataset}/JPEGImages"
    for method in ("cam", "par", "crf"):
        message = rf"error: method = '{method}' needs the classifier.* allowed is --method seg or --method seg_crf"
        with pytest.raises(SystemExit, match=message):
            main(["label", str(second), photos, str(tmp_path / "x"), "--method", method])
    with pytest.raises(ToCoError, match=r"model = 'second' has no trained classifier \(cls = 0\).* --method seg"):
        cams(smooth_image(20, 30, 1), second)
    with pytest.raises(SystemExit, match="error: second has no trained classifier: .* --method seg"):
        main(["page", str(second), f"{photos}/img_0.jpg", str(tmp_path / "x.html")])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run_is_named(run, second, tmp_path):
    """TrainConfig has no field 'toco_core', was said."""
    shared = save_pretrained(run, tmp_path / "shared")
    for folder in map(str, (second, shared)):
        said = f"error: {folder} is no run but a model that `toco share` or `toco second` wrote: `toco label` and"
        for name, *out in (["evaluate"], ["export", "out"], ["onnx", "out"], ["share", "out"]):
            with pytest.raises(SystemExit, match=said):
                main([name, folder, *(str(tmp_path / path) for path in out)])
    assert not (tmp_path / "out").exists()


def test_it_is_scored_on_a_data_set(run, second, tmp_path, capsys):
    """Its segmentation alone; a model that was handed on whole as its run is."""
    data, out = run.config().data.dataset, tmp_path / "scores.json"
    assert main(["evaluate", str(second), "--data", data, "--out", str(out)]) == 0
    _, heads, mean, *classes = capsys.readouterr().out.splitlines()
    opened, found = open_model(second), json.loads(out.read_text())
    seg = evaluate_as(opened.config, opened.model, VOCFolder(data, "train"), progress=False).seg
    assert found["miou"]["seg"] == pytest.approx(100 * seg.miou, abs=6e-4) and heads.endswith("segmentation")
    assert mean.split() == ["mIoU", *["-"] * 4, f"{100 * seg.miou:.1f}"] and len(classes) == len(CLASSES)
    assert found["miou"]["cam"] is None and found["protocol"].endswith("; the classifiers were not trained")
    assert not (second / "scores.json").exists()
    shared = save_pretrained(run, tmp_path / "shared")
    assert main(["evaluate", str(shared), "--data", data, "--out", str(out)]) == 0
    scores = score_run(open_run(run.folder), progress=False)._asdict()
    assert json.loads(out.read_text()) == json.loads(as_json(scores | {"classes": CLASSES}))
    other = write_voc_folder(tmp_path / "other", classes=("background", "cat", "wolf", "sheep"))
    with pytest.raises(SystemExit, match="error: second knows the classes cat, dog, sheep, but .*other has cat, wolf"):
        main(["evaluate", str(second), "--data", str(other)])


def test_second_networks_of_older_versions_are_known_by_their_card(run, second, tmp_path):
    """They had the config of the first run."""
    for name in ("model.safetensors", "README.md"):
        (tmp_path / name).write_bytes((second / name).read_bytes())
    facts = json.loads((second / "config.json").read_text())
    facts["config"]["loss"] = run.config().to_dict()["loss"]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    loss = open_model(tmp_path).config.loss
    assert (loss.cls, loss.aux_cls) == (0, 0) and loss == open_model(second).config.loss
    (tmp_path / "README.md").write_text("# Another network\n")
    assert open_model(tmp_path).config.loss == run.config().loss


def test_wrong_use_ends_in_one_line_before_anything_is_trained(run, tmp_path, monkeypatch):
    monkeypatch.delattr("toco_core.commands.second.train_segmentation")
    data = run.config().data.dataset
    for steps in ("0", "-1", "99999999999999999999999"):
        with pytest.raises(SystemExit, match=f"error: steps = {steps} is not allowed: at least 1, at most 1000000000"):
            main(["second", str(run.folder), data, str(tmp_path / "x"), "--steps", steps])
    with pytest.raises(SystemExit, match="error: .*none is not there|error: run = "):
        main(["second", str(tmp_path / "none"), data, str(tmp_path / "x")])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for folder, why in (("x", "folder = .*x' holds other files"), ("link", "cannot write to .*link: ")):
        with pytest.raises(SystemExit, match=f"error: {why}"):
            main(["second", str(run.folder), data, str(tmp_path / folder), "--steps", "1"])
