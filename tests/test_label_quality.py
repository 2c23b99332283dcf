"""Quality of labels against loops over pixels; thresholds tried on kept CAMs against labels made one by one."""

import dataclasses

import numpy as np
import pytest
import reference_audit as slow
import torch
from small_config import small_recipe, stirred_model
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core import labels
from toco_core.analysis import label_quality as lq
from toco_core.config import override
from toco_core.data import VOCFolder
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import look
from toco_core.labels import refined_labels

K = 3
IMAGE_LABELS = {"img_0": [1, 0, 1], "img_1": [0, 1, 0], "img_2": [1, 1, 1], "img_3": [0, 0, 0], "img_4": [0, 1, 1]}
BETAS = (0.15, 0.3, 0.55, 0.8)


@pytest.fixture(scope="module")
def model():
    return stirred_model(K)


@pytest.fixture(scope="module")
def config():
    return override(small_recipe(), crop_size=24, local_size=8, par_iterations=3, par_dilations=(1, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = write_voc_folder(tmp_path_factory.mktemp("quality") / "voc", n=5)
    return VOCFolder(root, "train", labels=IMAGE_LABELS)


@pytest.fixture(scope="module")
def items(model, source, config):
    return lq.cams_of_split(model, source, config)


def random_maps(seed, shape=(7, 11)):
    rng = np.random.default_rng(seed)
    values = np.array([0, 0, 1, 2, 3, 255], np.uint8)
    return rng.choice(values, shape), rng.choice(values, shape)


def assert_quality(found, wanted):
    assert_close(torch.tensor(list(found)), torch.tensor([wanted[f] for f in lq.LabelQuality._fields]), equal_nan=True)


# ---- counts


def test_quality_equals_loops_over_pixels():
    counts, pixels = lq.LabelCounts(K), []
    for seed, shape in ((0, (7, 11)), (1, (4, 9)), (2, (1, 3))):
        mask, label = random_maps(seed, shape)
        counts.update(mask, label)
        pixels += zip(mask.ravel().tolist(), label.ravel().tolist(), strict=True)
        assert_quality(counts.quality(), slow.quality(pixels, K))
    assert len(set(counts.quality())) == len(counts.quality())  # all different: none stands for another


@pytest.mark.parametrize(
    "mask, label",
    [
        ([[0, 0, 1]], [[255, 255, 255]]),  # nothing decided
        ([[0, 0, 1]], [[0, 0, 1]]),  # nothing uncertain, nothing wrong
        ([[255, 255]], [[0, 1]]),  # all void
        ([[0, 0, 0]], [[0, 255, 2]]),  # no object
        ([[2, 2, 0]], [[3, 255, 0]]),  # a class that the mask shows only where the label says nothing or another
    ],
)
def test_quality_where_something_is_missing(mask, label):
    counts = lq.LabelCounts(K)
    mask, label = np.array(mask, np.uint8), np.array(label, np.uint8)
    counts.update(mask, label)
    pixels = list(zip(mask.ravel().tolist(), label.ravel().tolist(), strict=True))
    assert_quality(counts.quality(), slow.quality(pixels, K))


def test_composition_equals_loops():
    mask, label = random_maps(3)
    counts = lq.LabelCounts(K)
    counts.update(mask, label)
    pixels = [(t, l) for t, l in zip(mask.ravel().tolist(), label.ravel().tolist(), strict=True) if t != 255]
    wanted = np.zeros((3, 3))
    for t, l in pixels:
        row = 1 if l == 255 else 0 if l == 0 else 2
        wanted[row, 0 if t == 0 else 2 if row == 2 and t != l else 1] += 1 / len(pixels)
    np.testing.assert_allclose(counts.composition(), wanted)
    assert wanted[2].min() > 0 and lq.LabelCounts(K).composition().sum() == 0


# ---- labels of an image


def test_groups_take_every_image_once(items, config):
    def label_of(item):
        return lq.seed_of(item, config.labels)

    found = lq.quality_by_group(items, label_of, K, groups=3)
    parts = ([items[0], items[3]], [items[1], items[4]], [items[2]])
    for quality, part in zip(found, parts, strict=True):
        assert_close(torch.tensor(quality), torch.tensor(lq.count_labels(part, label_of, K).quality()), equal_nan=True)
    with pytest.raises(ToCoError, match="groups = 6 is not allowed: 1 to 5"):
        lq.quality_by_group(items, label_of, K, groups=6)


def test_labels_equal_those_of_look(model, source, config, items):
    """img_3 has no labelled class; the others are not square and keep only some of the classes."""
    for index, item in enumerate(items):
        wanted = look(model, source, index, config)
        assert item.name == wanted.name and tuple(item.classes) == wanted.classes
        assert item.cam.shape[1] == len(item.classes)
        np.testing.assert_array_equal(item.image, wanted.image)
        np.testing.assert_array_equal(item.mask, wanted.mask)
        np.testing.assert_array_equal(lq.seed_of(item, config.labels), wanted.seed_label)
        np.testing.assert_array_equal(lq.pseudo_of(item, config.labels), wanted.pseudo_label)
    assert any((lq.seed_of(i, config.labels) != lq.pseudo_of(i, config.labels)).any() for i in items)


def test_crf_of_is_the_crf_between_two_thresholds(config, items):
    item, settings = items[0], {"iterations": 2, "appearance_sigma_rgb": 30.0}
    found = lq.crf_of(item, config.labels, **settings)
    betas = {name: getattr(config.labels, name) for name in ("beta_l", "beta_h")}
    one = {
        name: refined_labels(item.unit, item.cam, item.present, betas=[beta], refiner="crf", **settings)[0, 0]
        for name, beta in betas.items()
    }
    height, width = item.mask.shape
    for y in range(height):
        for x in range(width):
            place = (y * 24 // height, x * 24 // width)
            low, high = (int(one[name][place]) for name in ("beta_l", "beta_h"))
            wanted = item.classes[high - 1] if high else 255 if low else 0
            assert found[y, x] == wanted
    assert {0, 255} & set(np.unique(found).tolist())


def test_masks_are_required(model, config, tmp_path):
    bare = write_voc_folder(tmp_path / "voc", n=2)
    (bare / "SegmentationClass" / "img_1.png").unlink()
    some = VOCFolder(bare, "train", labels={n: IMAGE_LABELS[n] for n in ("img_0", "img_1")}, require_masks=False)
    with pytest.raises(ToCoError, match="img_1 has no mask"):
        lq.cams_of_split(model, some, config)


# ---- the grid


@pytest.mark.parametrize("refined", [False, True])
def test_grid_equals_labels_made_one_by_one(items, config, refined):
    grid = lq.threshold_grid(items, BETAS, config.labels, K, refined=refined)
    assert len(grid) == 10
    label_of = lq.pseudo_of if refined else lq.seed_of
    for (l, h), found in grid.items():
        if l < h:
            one = dataclasses.replace(config.labels, beta_l=l, beta_h=h)
            wanted = lq.count_labels(items, lambda item, one=one: label_of(item, one), K).quality()
            assert_close(torch.tensor(list(found)), torch.tensor(list(wanted)), equal_nan=True)
        else:
            assert found.coverage == 1 and found.miou == found.strict_miou
    assert len({round(q.miou, 6) for q in grid.values()}) > 5


def test_one_threshold_of_the_seed_is_the_label_that_cams_are_scored_with(items, config):
    grid = lq.threshold_grid(items, BETAS, config.labels, K, refined=False)
    for beta in BETAS:
        wanted = lq.count_labels(
            items, lambda i, beta=beta: i.native(labels.eval_label(i.cam, i.present, beta=beta))[0], K
        )
        assert_close(torch.tensor(grid[beta, beta].miou), torch.tensor(wanted.quality().miou))


def test_matrix_and_choice(items, config):
    grid = lq.threshold_grid(items, BETAS, config.labels, K, refined=False)
    coverage = lq.as_matrix(grid, BETAS, "coverage")
    assert coverage.shape == (4, 4) and np.isnan(coverage[np.tril_indices(4, -1)]).all()
    for i, l in enumerate(BETAS):
        assert [coverage[i, j] for j in range(i, 4)] == [grid[l, h].coverage for h in BETAS[i:]]
        assert (np.diff(coverage[i, i:]) <= 0).all()  # more room for doubt, fewer decided pixels
    least = 0.5 * (coverage[0, 3] + coverage[0, 1])
    chosen = lq.best_thresholds(grid, least)
    rivals = [(l, h) for l in BETAS for h in BETAS if l < h and grid[l, h].coverage >= least]
    assert chosen in rivals and grid[chosen].miou == max(grid[pair].miou for pair in rivals)
    assert 1 < len(rivals) < 6
    with pytest.raises(ToCoError, match="least_coverage = 1.1: at most 0"):
        lq.best_thresholds(grid, 1.1)
    nothing = lq.LabelCounts(K).quality()._replace(coverage=0.0)  # decides no pixel: its mIoU is NaN
    assert lq.best_thresholds({(0.0, 0.1): nothing} | grid, 0.0) == lq.best_thresholds(grid, 0.0)


@pytest.mark.parametrize("betas", [(), (0.3, 0.2), (0.2, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_the_grid_refuses(items, config, betas):
    with pytest.raises(ToCoError, match="betas = .*ascending"):
        lq.threshold_grid(items, betas, config.labels, K, refined=False)
