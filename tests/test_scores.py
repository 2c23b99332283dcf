"""Scores of runs: chosen on val, reported on test, kept beside the run."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_config import small_recipe
from torch.testing import assert_close
from voc_folder import CLASSES, smooth_image, write_list, write_voc_folder

import toco_core.evaluation.scores as scoring
from toco_core.__main__ import main
from toco_core.config import override
from toco_core.data import VOCFolder, evaluation_items, open_source, open_train_val
from toco_core.data.layouts.tags import write_tag_list
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate_as, look
from toco_core.evaluation.metrics import ConfusionMatrix, OpenCounts
from toco_core.evaluation.protocols import assess
from toco_core.evaluation.scores import (
    SCORED,
    RunScores,
    pseudo_label_iou,
    read_scores,
    reported_part,
    score_run,
    scored_run,
)
from toco_core.predict.image import ImagePredictor, eval_size
from toco_core.predict.tokens import similarity_of_split
from toco_core.runs.opened import open_run
from toco_core.train.loop import train

K = 3
SMALL = {
    "backbone": "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)", "pretrained": False, "layer": 2,
    "proj_hidden": 24, "proj_bottleneck": 12, "proj_dim": 10, "decoder_width": 14, "par_iterations": 2,
    "par_dilations": (1, 2), "local_size": 16, "n_local": 2, "crop_size": 32, "cam_scales": (1.0,), "batch_size": 2,
    "warmup_steps": 0, "eval_interval": 0, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def config_of(root, out_dir, **changes):
    return override(small_recipe(), **SMALL, dataset=str(root), out_dir=str(out_dir), steps=2, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    splits = {"train": range(6), "val": (6, 7, 8), "test": (9, 10, 11, 12)}
    return write_voc_folder(tmp_path_factory.mktemp("data") / "voc", n=13, splits=splits)


@pytest.fixture(scope="module")
def scored(root, tmp_path_factory):
    return scored_run(config_of(root, tmp_path_factory.mktemp("runs")), progress=False)


# ---- counts of pseudo labels


def test_an_open_pixel_is_a_missed_one():
    """Two classes by hand. Background: 3 pixels, 2 found, 1 open. Class 1: 4 pixels, 1 found, 1 taken for background,
    2 open; void does not count whatever is said there."""
    truth = np.array([[0, 0, 0, 1, 1, 1, 1, 255, 255]], np.uint8)
    label = np.array([[0, 0, 255, 1, 0, 255, 255, 1, 255]])
    counts = OpenCounts(1)
    counts.update(truth, label)
    assert_close(counts.scores().iou, np.array([2 / 4, 1 / 4]))
    assert_close(counts.scores().miou, 3 / 8)
    assert_close(counts.decided, 4 / 7)


def test_counts_equal_loops_over_pixels():
    rng = np.random.default_rng(0)
    counts, truths, labels = OpenCounts(K), [], []
    for shape in ((5, 7), (11, 3)):
        truth, label = (rng.choice([0, 1, 2, 3, 255], shape).astype(np.uint8) for _ in range(2))
        counts.update(truth, label)
        truths, labels = truths + truth.ravel().tolist(), labels + label.ravel().tolist()
    pairs = [(t, p) for t, p in zip(truths, labels, strict=True) if t != 255]
    for c in range(K + 1):
        both, either = sum(t == p == c for t, p in pairs), sum(t == c or p == c for t, p in pairs)
        assert_close(counts.scores().iou[c], np.float64(both / either))
    assert_close(counts.decided, sum(p != 255 for _, p in pairs) / len(pairs))


def test_labels_without_open_pixels_score_as_always():
    rng = np.random.default_rng(1)
    truth, label = rng.choice([0, 1, 2, 3, 255], (9, 8)).astype(np.uint8), rng.integers(0, 4, (9, 8))
    counts, matrix = OpenCounts(K), ConfusionMatrix(K)
    counts.update(truth, label)
    matrix.update(truth, label)
    assert_close(counts.scores().miou, matrix.scores().miou)
    assert counts.decided == 1
    nothing = OpenCounts(K)
    nothing.update(truth, np.full((9, 8), 255))
    assert nothing.scores().miou == 0 and nothing.decided == 0


# ---- a run


def test_thresholds_are_of_val_and_scores_of_test(scored, root):
    found = scored.scores
    opened = open_run(scored.run.folder)
    test = VOCFolder(root, "test")
    val, final = (
        evaluate_as(scored.config, opened.model, source, progress=False) for source in (opened.data.val, test)
    )
    assert found.part == "test" and found.protocol.startswith("test: 4 images at 32 x 32")
    assert (found.beta, found.aux_beta) == (val.cam.best_beta, val.aux_cam.best_beta)
    assert_close(found.val["cam"], 100 * max(val.cam.miou), rtol=0, atol=6e-4)
    assert_close(found.val["aux_cam"], 100 * max(val.aux_cam.miou), rtol=0, atol=6e-4)
    for name, scores in (
        ("cam", final.cam.scores(found.beta)),
        ("aux_cam", final.aux_cam.scores(found.aux_beta)),
        ("seg", final.seg),
    ):
        assert_close(found.miou[name], 100 * scores.miou, rtol=0, atol=6e-4)
        assert_close(np.array(found.iou[name]), 100 * scores.iou, rtol=0, atol=6e-4, equal_nan=True)
    assert_close(
        found.token_similarity, similarity_of_split(opened.model, opened.data.val, scored.config), rtol=0, atol=1e-4
    )


def test_pseudo_labels_are_those_of_each_image(scored, root):
    """Image by image through `look`, which does not know of batches."""
    opened, test = open_run(scored.run.folder), VOCFolder(root, "test")
    counts = OpenCounts(K)
    for i in range(len(test)):
        counts.update(test.mask(i), look(opened.model, test, i, scored.config).pseudo_label)
    assert_close(scored.scores.miou["pseudo_label"], 100 * counts.scores().miou, rtol=0, atol=6e-4)
    assert_close(scored.scores.committed, 100 * counts.decided, rtol=0, atol=6e-4)
    assert_close(
        np.array(scored.scores.iou["pseudo_label"]), 100 * counts.scores().iou, rtol=0, atol=6e-4, equal_nan=True
    )


def test_the_refined_cam_is_cut_where_it_is_best_on_val(scored, root):
    """Image by image and threshold by threshold, by the predictor."""
    opened, test = open_run(scored.run.folder), VOCFolder(root, "test")

    def miou(source, beta):
        matrix, predictor = ConfusionMatrix(K), ImagePredictor(opened.model, scored.config)
        for item in evaluation_items(source, size=eval_size(scored.config), native=True):
            predictor.set_item(item)
            matrix.update(item.mask, predictor.refined_label(beta))
        return 100 * matrix.scores().miou

    of_val = {beta: miou(opened.data.val, beta) for beta in scoring.refined_near(scored.scores.beta)}
    assert len(set(of_val.values())) > 1
    assert of_val[scored.scores.refined_beta] == pytest.approx(max(of_val.values()), abs=6e-4)
    assert scored.scores.val["refined"] == pytest.approx(max(of_val.values()), abs=6e-4)
    assert scored.scores.miou["refined"] == pytest.approx(miou(test, scored.scores.refined_beta), abs=6e-4)


def test_refined_thresholds_lie_about_that_of_the_cam():
    assert scoring.refined_near(0.4) == [0.2, 0.25, 0.3, 0.35, 0.4, 0.45]
    assert scoring.refined_near(0.1) == [0.0, 0.05, 0.1, 0.15] and scoring.refined_near(1.0)[-1] == 1.0


def test_scores_of_before_the_refined_cam_are_made_anew(scored, tmp_path):
    path = scored.run.folder / "scores.json"
    whole = path.read_text()
    path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "refined_beta"}))
    try:
        assert read_scores(scored.run) is None
        np.testing.assert_equal(scored_run(scored.config, progress=False).scores._asdict(), scored.scores._asdict())
    finally:
        path.write_text(whole)


def test_a_second_time_answers_from_the_folder(scored, monkeypatch):
    for name in ("train", "evaluate_as"):
        monkeypatch.setattr(scoring, name, lambda *_, **__: pytest.fail("it is computed again"))
    again = scored_run(scored.config)
    np.testing.assert_equal(again.scores._asdict(), scored.scores._asdict())
    assert again.run.folder == scored.run.folder
    np.testing.assert_equal(score_run(open_run(scored.run.folder))._asdict(), scored.scores._asdict())


def test_a_finished_run_is_scored_without_training(scored, monkeypatch):
    (scored.run.folder / "scores.json").unlink()
    before = (scored.run.folder / "checkpoint.pt").stat().st_mtime_ns
    again = scored_run(scored.config, progress=False)
    np.testing.assert_equal(again.scores._asdict(), scored.scores._asdict())
    assert (scored.run.folder / "checkpoint.pt").stat().st_mtime_ns == before


def test_scores_do_not_outlive_their_run(scored, tmp_path):
    run = scored.run.__class__(tmp_path / "copy")
    run.begin(scored.config)
    run.finish({})
    run.keep_scores(scored.scores._asdict())
    assert read_scores(run) is not None
    run.begin(scored.config)
    assert read_scores(run) is None
    run.keep_scores(scored.scores._asdict())
    assert read_scores(run) is None  # not finished


def test_scores_of_another_version_are_refused(scored, tmp_path):
    run = scored.run.__class__(tmp_path)
    run.finish({})
    run.keep_scores({"part": "val"})
    with pytest.raises(ToCoError, match="scores.json is of another version: delete it"):
        read_scores(run)


def test_nan_survives_the_folder(scored, tmp_path):
    run = scored.run.__class__(tmp_path)
    run.finish({})
    iou = {name: [float("nan"), 2.0] for name in scored.scores.iou}
    run.keep_scores(scored.scores._replace(iou=iou)._asdict())
    assert "NaN" not in (tmp_path / "scores.json").read_text()
    json.loads((tmp_path / "scores.json").read_text())
    np.testing.assert_equal(read_scores(run).iou, iou)


def test_without_a_test_part_val_is_reported(tmp_path):
    root = write_voc_folder(tmp_path / "voc", n=6, splits={"train": range(4), "val": (4, 5)})
    found = scored_run(config_of(root, tmp_path / "runs"), progress=False).scores
    assert isinstance(found, RunScores) and found.part == "val"
    assert all(found.val[name] == found.miou[name] for name in ("cam", "aux_cam", "seg"))


def test_a_test_part_without_masks_is_not_reported(tmp_path):
    root = write_voc_folder(tmp_path / "voc", n=8, splits={"train": range(4), "val": (4, 5), "test": (6, 7)})
    data = open_train_val(root)
    assert reported_part(data)[0] == "test"
    for i in (6, 7):
        (root / "SegmentationClass" / f"img_{i}.png").unlink()
    assert reported_part(data) == ("val", data.val)
    found = scored_run(config_of(root, tmp_path / "runs"), progress=False).scores
    assert found.part == "val" and found.protocol.startswith("val: ")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """A run on tagged photographs of which the test part alone has masks."""
    folder = tmp_path_factory.mktemp("tagged")
    splits = {"train": range(4), "val": (4, 5, 6), "test": (7, 8)}
    drawn = write_voc_folder(folder / "voc", n=9, splits=splits)
    photos = write_tag_list(folder / "photos", {name: VOCFolder(drawn, name) for name in splits}, masks=["test"])
    return drawn, scored_run(config_of(photos, folder / "runs", beta=0.35), progress=False)


def test_where_val_has_no_masks_the_thresholds_are_the_configs(tagged, monkeypatch):
    config, run, found = tagged[1]
    assert found.part == "test" and found.protocol.endswith("; threshold 0.35 of the config, as val has no masks")
    assert found.beta == found.aux_beta == found.refined_beta == config.labels.beta == 0.35
    assert all(map(math.isnan, found.val.values())) and not any(map(math.isnan, found.miou.values()))
    opened = open_run(run.folder)
    final = evaluate_as(config, opened.model, open_source(config.data.dataset, "test"), progress=False)
    for name in ("cam", "aux_cam"):
        assert_close(found.miou[name], 100 * getattr(final, name).scores(0.35).miou, rtol=0, atol=6e-4)
    assert_close(found.miou["seg"], 100 * final.seg.miou, rtol=0, atol=6e-4)
    monkeypatch.setattr(scoring, "evaluate_as", lambda *_, **__: pytest.fail("it is computed again"))
    assert main(["evaluate", str(run.folder)]) == 0


@pytest.mark.parametrize("masked", [(4, 5, 6), (6,)], ids=["all", "the last"])
def test_masks_of_val_that_came_later_choose_the_thresholds(tagged, tmp_path, monkeypatch, masked):
    """However few, and wherever in the list they are."""
    drawn, (config, run, _) = tagged
    whole = {path: path.read_bytes() for path in (Path(config.data.dataset), run.folder / "scores.json")}
    photos = next(iter(whole))
    lines = photos.read_text().splitlines()
    for i in masked:
        (photos.parent / f"masks/val{i}.png").write_bytes((drawn / f"SegmentationClass/img_{i}.png").read_bytes())
        lines = [line + f"masks/val{i}.png" if f"img_{i}." in line else line for line in lines]
    photos.write_text("\n".join(lines))
    monkeypatch.setattr(scoring, "CHOOSERS", 1)
    try:
        opened = open_run(run.folder)
        assert opened.data.val.n_masks == len(masked)
        with pytest.warns(UserWarning, match="is scored again: val had no masks when it was scored"):
            found = score_run(opened, progress=False)
        assert found.protocol.endswith("; thresholds chosen on val") and found.val["cam"] >= 0
        np.testing.assert_equal(read_scores(run)._asdict(), found._asdict())
    finally:
        for path, content in whole.items():
            path.write_bytes(content)


def test_a_test_part_that_cannot_be_opened_is_none(tmp_path):
    root = write_voc_folder(tmp_path / "voc", n=6, splits={"train": range(4), "val": (4, 5)})
    write_list(root, "test", ["img_5", "img_77"])
    data = open_train_val(root)
    message = "scores are of val, as test cannot be opened: .*img_77"
    with pytest.warns(UserWarning, match=message):
        assert reported_part(data) == ("val", data.val)
    with pytest.warns(UserWarning, match=message):
        run = scored_run(config_of(root, tmp_path / "runs"), progress=False).run
    assert read_scores(run).part == "val"
    write_list(root, "test", ["img_5"])
    with pytest.warns(UserWarning, match="scored again: its scores are of val, and test is what can be scored today"):
        assert score_run(open_run(run.folder), progress=False).part == "test"


def test_nearest_equals_torch():
    rng = np.random.default_rng(2)
    label = rng.integers(0, 9, (7, 5))
    for size in ((7, 5), (13, 4), (3, 11), (14, 10)):
        slow = torch.nn.functional.interpolate(torch.from_numpy(label)[None, None].float(), size=size, mode="nearest")
        np.testing.assert_array_equal(scoring._nearest(label, size), slow[0, 0].long().numpy())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iou", {"cam": [10**400]}), ("iou", {"cam": ["a"]}), ("miou", {"cam": "much"}), ("beta", "half"),
        ("part", 3), ("val", [1]), ("token_similarity", {"a": 1}), ("token_similarity", [True]), ("committed", 10**400),
        ("refined_beta", [1]),
    ],
)  # fmt: skip
def test_scores_that_are_no_numbers(scored, name, value):
    path = scored.run.folder / "scores.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {name: value}))
    try:
        with pytest.raises(ToCoError, match="scores.json holds no scores"):
            read_scores(scored.run)
    finally:
        path.write_text(whole)


def test_pictures_are_ranked_by_the_pseudo_label_that_is_scored(root, scored):
    opened = open_run(scored.run.folder)
    source = VOCFolder(root, "test")
    options = dict.fromkeys(("beta", "aux_beta", "refined_beta"), 0.4)
    options |= {"part": "test", "chosen_on": "val", "scales": (1.0,), "crf": False}
    wanted = assess(opened.model, source, opened.config, **options, progress=False).image_iou("pseudo_label")
    found = pseudo_label_iou(opened.model, source, opened.config)
    assert found.shape == (4,) and len(set(found.round(6))) > 1
    assert_close(found, wanted)


# ---- the command


def test_the_command_scores_a_run_that_has_no_scores_yet(scored, tmp_path, capsys):
    folder = shutil.copytree(scored.run.folder, tmp_path / scored.run.folder.name)
    (folder / "scores.json").unlink()
    assert main(["evaluate", str(folder)]) == 0
    assert (folder / "scores.json").read_bytes() == (scored.run.folder / "scores.json").read_bytes()
    mean = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU"))
    assert mean.split()[1:] == [f"{scored.scores.miou[kind]:.1f}" for kind in SCORED]


def test_the_command_says_where_there_are_no_masks(tmp_path):
    folder = tmp_path / "photographs"
    for i in range(6):
        (folder / CLASSES[1 + i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_image(32, 40, i)).save(folder / CLASSES[1 + i % 3] / f"{i}.png")
    with pytest.raises(ToCoError, match="photographs: none of the . images of val has a mask to score by"):
        scored_run(config_of(folder, tmp_path / "runs"), progress=False)
    assert not (tmp_path / "runs").exists(), "it was trained before it was refused"
    run = train(config_of(folder, tmp_path / "runs"), progress=False).run
    with pytest.raises(SystemExit, match="error: .*photographs: none of the . images of val has a mask to score by"):
        main(["evaluate", str(run.folder)])
