"""Masks without classes: the vote against a slow second version, the forms of the generators, and a real run."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from killed_training import SMALL
from PIL import Image
from pycocotools import mask as rle
from small_config import small_recipe
from voc_folder import smooth_image, write_voc_folder

from toco_core import labels
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.refiners import REFINERS, MaskVote, build_refiner
from toco_core.refiners.masks import mask_stack, superpixels, voted
from toco_core.train.loop import train

H, W = 7, 11
BETAS = {"beta_l": 0.3, "beta_h": 0.6}


def slow_vote(label, masks):
    """Pixel by pixel: the mask that lies on top of it, and the label that most of that mask has."""
    result = label.copy()
    for y in range(label.shape[0]):
        for x in range(label.shape[1]):
            best = None
            for n, mask in enumerate(masks):
                if mask[y, x] and (best is None or mask.sum() < masks[best].sum()):  # of two as small, the first
                    best = n
            if best is not None:
                inside = [int(label[i, j]) for i, j in np.argwhere(masks[best])]
                result[y, x] = min(set(inside), key=lambda k: (-inside.count(k), k))
    return result


@pytest.mark.parametrize("seed", range(12))
def test_each_mask_takes_the_label_with_the_largest_overlap(seed):
    """Masks of few pixels, so that counts and sizes tie; overlapping, nested, empty, and pixels of none."""
    rng = np.random.default_rng(seed)
    label, masks = rng.integers(0, 4, (H, W)), np.zeros((9, H, W), bool)
    for mask in masks[:-1]:  # the last one stays empty
        y, x = rng.integers(0, H), rng.integers(0, W)
        mask[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
    expected = slow_vote(label, masks)
    np.testing.assert_array_equal(voted(label, masks), expected)
    assert (expected != label).any() and not masks.any(0).all()


def test_ties():
    label = np.array([[0, 0, 2, 2, 1, 1], [3, 3, 3, 3, 3, 3]])
    first, second = np.zeros((2, 2, 6), bool)
    first[0, :4] = True  # two of background, two of class 2: background
    second[0, 2:] = True  # two of class 1, two of class 2: class 1; as large, and given later: below
    np.testing.assert_array_equal(voted(label, np.stack([first, second])), [[0, 0, 0, 0, 1, 1], [3] * 6])
    np.testing.assert_array_equal(voted(label, np.stack([second, first])), [[0, 0, 1, 1, 1, 1], [3] * 6])


# ---- what generators give


@pytest.fixture
def stack():
    rng = np.random.default_rng(3)
    return rng.random((4, H, W)) < 0.4


def test_every_known_form_is_the_same_stack(stack):
    packed = [rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in stack]
    texts = [{"size": p["size"], "counts": p["counts"].decode()} for p in packed]
    flat = [mask.T.ravel().astype(int) for mask in stack]
    runs = []
    for mask in flat:
        edges = np.flatnonzero(np.diff(mask)) + 1
        runs.append({"size": [H, W], "counts": [0] * int(mask[0]) + np.diff([0, *edges, H * W]).tolist()})
    forms = {
        "binary_mask": [{"segmentation": mask, "area": int(mask.sum()), "bbox": [0, 0, 1, 1]} for mask in stack],
        "coco_rle": [{"segmentation": text} for text in texts],
        "bytes": [{"segmentation": p} for p in packed],
        "uncompressed_rle": [{"segmentation": run} for run in runs],
        "stack": stack,
        "numbers": stack.astype(np.float32),
        "tensor": torch.from_numpy(stack),
        "predictor": torch.from_numpy(stack)[:, None],
        "list of arrays": list(stack),
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(mask_stack(form, (H, W)), stack, err_msg=name)
    cells = np.arange(H * W).reshape(H, W) // 20
    np.testing.assert_array_equal(mask_stack(cells, (H, W)), [cells == n for n in range(4)])
    assert mask_stack([], (H, W)).shape == (0, H, W) and mask_stack(stack[:0], (H, W)).shape == (0, H, W)


def test_masks_of_another_size_are_resized_to_the_nearest_pixel(stack):
    size = (5, 23)
    wanted = F.interpolate(torch.from_numpy(stack)[None].float(), size=size, mode="nearest-exact")[0] > 0
    np.testing.assert_array_equal(mask_stack(stack, size), wanted.numpy())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("a.png", "masks = str is not allowed: a list of dictionaries"),
        (np.zeros((2, 3, 4, 5)), "masks = float64 of .2, 3, 4, 5. is not allowed"),
        (np.full((2, 3, 4), 0.5), "masks = float64 of .2, 3, 4. is not allowed"),
        ([{"bbox": [0, 0, 1, 1]}], "a mask is NoneType: a list of dictionaries"),
        ([np.full((3, 4), 2)], "a mask of .3, 4. holds other values than 0 and 1"),
        ([{"segmentation": {"size": [H, W], "counts": [3]}}], "the counts of an RLE do not add up to 7 x 11"),
        ([{"segmentation": {"size": [0, 5], "counts": []}}], "an RLE of size .0, 5."),
        ([{"segmentation": {"size": [1 << 20, 1 << 20], "counts": [1 << 40]}}], "at most 134217728 are read"),
        ([None] * 6000, "6000 masks of one image are not allowed: at most 5000"),
        (np.arange(6000).reshape(60, 100), "6000 masks of one image are not allowed"),
    ],
)
def test_what_are_no_masks_is_refused(wrong, words):
    with pytest.raises(ToCoError, match=words):
        mask_stack(wrong, (H, W))


# ---- as a refiner


def hills(n=2):
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand(n, 3, 4, 5, generator=generator), size=(H, W), mode="bilinear")
    cam = F.interpolate(torch.rand(n, 3, 3, 4, generator=generator), size=(H, W), mode="bilinear")
    return images, cam, torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]])[:n]


@pytest.mark.parametrize("n", [1, 3])
def test_a_mask_is_uncertain_where_its_votes_differ(n, stack):
    """The pseudo label from its parts: two labels of one threshold, a vote on each, and where they differ, 255."""
    images, cam, present = hills(n)
    cam = cam.double()
    own = [stack, ~stack, stack[:2]][:n]
    found = labels.pseudo_label(images, cam, present, **BETAS, refiner="masks", masks=own)
    strict, lenient = (labels.eval_label(cam, present, beta=beta).numpy() for beta in (0.6, 0.3))
    for b in range(n):
        high, low = slow_vote(strict[b], own[b]), slow_vote(lenient[b], own[b])
        np.testing.assert_array_equal(found[b], np.where((high == 0) & (low > 0), 255, high))
    assert len(found.unique()) > 2 and 255 in found and (n == 1 or 0 in found)


def test_a_generator_is_called_once_for_each_image(stack):
    images, cam, present = hills(2)
    seen = []

    def generate(image):
        seen.append(image)
        return [{"segmentation": mask} for mask in (stack, ~stack)[len(seen) - 1]]

    found = labels.pseudo_label(images, cam, present, **BETAS, refiner="masks", masks=generate)
    given = labels.pseudo_label(images, cam, present, **BETAS, refiner="masks", masks=[stack, ~stack])
    assert torch.equal(found, given) and len(seen) == 2
    assert seen[1].dtype == np.uint8 and seen[1].shape == (H, W, 3)
    np.testing.assert_array_equal(seen[1], (255 * images[1]).round().byte().permute(1, 2, 0).numpy())


def test_wrong_use_is_told(stack):
    images, cam, present = hills(2)
    with pytest.raises(ToCoError, match="refiner = 'masks' needs masks = a function of an image"):
        labels.pseudo_label(images, cam, present, **BETAS, refiner="masks")
    with pytest.raises(ToCoError, match="masks of 3 images are not allowed: 2 images are refined"):
        build_refiner("masks", masks=[stack] * 3)(images, [cam / 3])


def test_superpixels_are_cells_that_end_at_edges():
    """A dark square on a bright ground: hardly a cell lies on both."""
    image = np.full((60, 84, 3), 220, np.uint8)
    image[14:43, 25:61] = 30
    cells = superpixels(image, smoothing=1.0)
    assert cells.shape == (60, 84) and 30 < len(np.unique(cells)) <= 36
    square = image[:, :, 0] < 100
    mixed = sum(min((cells[square] == n).sum(), (cells[~square] == n).sum()) for n in np.unique(cells))
    assert mixed < 0.06 * square.sum()


@pytest.mark.parametrize("size", [(60, 84), (13, 50), (5, 7), (1, 1)])
def test_superpixels_leave_no_pixel_between_them(size):
    """The lines of a watershed, which lie across all objects, would be one mask more, with the label of most of it."""
    cells = superpixels(smooth_image(*size, 4))
    assert np.unique(cells).tolist() == list(range(1, cells.max() + 1))
    assert all(cv2.connectedComponents((cells == n).astype(np.uint8))[0] == 2 for n in np.unique(cells))
    object_ = np.zeros(size, int)
    object_[size[0] // 4 :, size[1] // 4 :] = 1
    inside = [n for n in np.unique(cells) if object_[cells == n].mean() > 0.5]
    np.testing.assert_array_equal(voted(object_, mask_stack(cells, size)), np.isin(cells, inside))


def test_a_real_run_follows_the_cells():
    """Labels from a CAM and OpenCV's superpixels: one label in each cell, and not the label without them."""
    image = torch.from_numpy(smooth_image(48, 64, 2)).permute(2, 0, 1)[None] / 255
    cam = F.interpolate(
        torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(2)), size=(48, 64), mode="bilinear"
    )
    options = {"beta_l": 0.4, "beta_h": 0.65}
    found = labels.pseudo_label(image, cam, torch.tensor([[1.0, 1, 0]]), **options, refiner="masks", masks=superpixels)
    cells = superpixels(np.ascontiguousarray((255 * image[0]).round().byte().permute(1, 2, 0).numpy()))
    for number in np.unique(cells):
        inside = found[0].numpy()[cells == number]
        assert len(set(inside.tolist())) == 1, number
    plain = labels.pseudo_label(image, cam, torch.tensor([[1.0, 1, 0]]), **options, refiner="none")
    assert {0, 1, 2, 255} >= set(found.unique().tolist()) and 0.5 < (found == plain).float().mean() < 1


def test_a_training_with_superpixels(tmp_path, monkeypatch):
    """A row of one's own settings, chosen by the config: what the decoder learns from follows the cells."""
    monkeypatch.setitem(REFINERS, "cells", lambda: MaskVote(lambda image: superpixels(image, spacing=6)))
    folder = write_voc_folder(tmp_path / "data", n=4)
    values = SMALL | {"dataset": str(folder), "out_dir": str(tmp_path), "steps": 2, "seg_start": 0, "eval_interval": 0}
    run = train(override(small_recipe(), **values, refiner="cells"), progress=False).run
    assert run.finished and all(np.isfinite(r["seg"]) for r in run.records() if "seg" in r)


def test_the_how_to_runs(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[1] / "docs" / "howto.md").read_text()
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "superpixels" in part)
    Image.fromarray(smooth_image(96, 120, 5)).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["label"].shape == (96, 120) and set(np.unique(names["label"])) <= {0, *names["shown"], 255}
