"""Agreement with the published release, component by component: reference_files.py says where its values lie."""

from pathlib import Path

import pytest
import torch
from reference_files import ATOL, RTOL, assert_labels_agree, load_reference, reference  # noqa: F401

from toco_core import crops, labels, par
from toco_core.evaluation import metrics

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VOC = {"beta_l": 0.25, "beta_h": 0.7}


def same(ours, theirs):
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=0)


def test_par(reference):  # noqa: F811
    arrays = reference("par.npz")
    for name, settings in {
        "refined_10": {"iterations": 10, "dilations": (1, 2, 4, 8, 12, 24)},
        "refined_3": {"iterations": 3, "dilations": (1, 2, 4)},
    }.items():
        refined = par.refine(arrays["images"], arrays["masks"], **settings)
        torch.testing.assert_close(refined, arrays[name], rtol=RTOL, atol=ATOL)


def test_cam_labels(reference):  # noqa: F811
    arrays = reference("cam_labels.npz")
    cam, image_labels, boxes = arrays["cam"], arrays["image_labels"], arrays["boxes"]
    same(labels.valid_cam(cam, image_labels), arrays["valid_cam"])
    same(labels.seed_label(cam, image_labels, **VOC, valid_box=boxes), arrays["train_label"])
    same(labels.eval_label(cam, image_labels, beta=0.5), arrays["eval_label"])
    same(labels.region_mask(cam, image_labels, **VOC), arrays["roi_mask"])


def test_labels_after_par(reference):  # noqa: F811
    arrays = reference("cam_labels.npz")
    ours = labels.pseudo_label(
        arrays["images"], arrays["cam"], arrays["image_labels"], **VOC, valid_box=arrays["boxes"], scale=0.5
    )
    assert_labels_agree(ours, arrays["par_label"])


def test_affinity_mask(reference):  # noqa: F811
    arrays = reference("ptc.npz")
    same(labels.affinity_mask(arrays["labels"]), arrays["affinity"])


def test_crop_flags(reference):  # noqa: F811
    arrays = reference("crop_flags.npz")
    size = int(arrays["crop_size"])
    same(crops.crop_flags(arrays["roi_mask"], arrays["top"], arrays["left"], size), arrays["positive"])


def test_token_labels_with_the_releases_pixel_boxes(reference):  # noqa: F811
    arrays = reference("train_step.npz")
    grid = tuple(arrays["aux_label"].shape[1:])
    ours = labels.token_label(
        arrays["aux_cam"], arrays["image_labels"], grid, **VOC, valid_box=arrays["boxes"], pixel_box_on_tokens=True
    )
    same(ours, arrays["aux_label"])


def test_regions_and_flags_of_a_training_step(reference):  # noqa: F811
    arrays = reference("train_step.npz")
    region = labels.region_mask(arrays["aux_cam"], arrays["image_labels"], **VOC)
    same(region, arrays["roi_mask"])
    flags = crops.crop_flags(region, arrays["top"], arrays["left"], int(arrays["crop_size"]))
    n_global = arrays["positive"].shape[1] - flags.shape[1]  # global views come first and are always positive
    same(flags, arrays["positive"][:, n_global:])


def test_labels_after_par_of_a_training_step(reference):  # noqa: F811
    arrays = reference("train_step.npz")
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    images = (arrays["images"] * std + mean).mul(255).to(
        torch.uint8
    ) / 255  # whole grey levels, rounded down as by the release
    ours = labels.pseudo_label(images, arrays["cam"], arrays["image_labels"], **VOC, valid_box=arrays["boxes"])
    assert_labels_agree(ours, arrays["par_label"])


def test_scores(reference):  # noqa: F811
    arrays = reference("scores.npz")
    matrix = metrics.ConfusionMatrix(len(arrays["iou"]) - 1)
    for truth, prediction in zip(arrays["ground_truth"], arrays["prediction"], strict=True):
        matrix.update(truth, prediction)
    scores = matrix.scores()
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "iou"):
        ours = torch.as_tensor(getattr(scores, name), dtype=torch.float64)
        torch.testing.assert_close(ours, arrays[name].double(), rtol=1e-12, atol=0, equal_nan=True)


def test_a_missing_file_is_skipped_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("TOCO_REFERENCE", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="par.npz is not in TOCO_REFERENCE"):
        load_reference("par.npz")


def test_the_copied_files_are_small():
    folder = Path(__file__).parent / "reference_values"
    assert max(path.stat().st_size for path in folder.iterdir()) < 700_000
