"""Labels, PAR, crops and CAM: fast against slow over random odd sizes and every special case, in float64.

The losses have theirs in test_losses.py, the dense energy in test_crf.py.
"""

import pytest
import reference_labels as slow
import reference_model
import torch
from test_model import K, slow_tokens, small_model
from torch.testing import assert_close

from toco_core import crops, labels, par
from toco_core.cam import multi_scale_cam
from toco_core.conventions import IGNORE

CONTENTS = ("random", "one class of many", "no class", "every class", "one image has none", "nothing inside the box")
BETAS = {"beta_l": 0.25, "beta_h": 0.75}  # exact, so that values on a threshold are on it for both


class Draw:
    """Random numbers of one case."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, low, high):
        """low <= n < high"""
        return int(torch.randint(low, high, (), generator=self.generator))

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def image_labels(self, batch, classes, contents):
        present = (self.rand(batch, classes) < 0.5).float()
        if contents == "one class of many":
            present = torch.nn.functional.one_hot(torch.arange(batch) % classes, classes).float()
        if contents in ("no class", "every class"):
            present.fill_(contents == "every class")
        if contents == "one image has none":
            present[-1] = 0
        return present

    def boxes(self, batch, height, width, contents):
        if contents == "nothing inside the box":
            return torch.tensor([[height // 2, height // 2, 0, width]] * batch)
        edges = [sorted((self.pick(0, n + 1), self.pick(0, n + 1))) for _ in range(batch) for n in (height, width)]
        return torch.tensor(edges).view(batch, 4)


def same(ours, theirs):
    assert_close(ours.long(), theirs.long(), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(24))
def test_labels(seed):
    draw, contents = Draw(seed), CONTENTS[seed % len(CONTENTS)]
    batch, classes, height, width = draw.pick(1, 4), draw.pick(1, 6), draw.pick(1, 12), draw.pick(1, 12)
    cam = (draw.rand(batch, classes, height, width) * 20).round() / 20  # with ties, and values on the thresholds
    present, box = draw.image_labels(batch, classes, contents), draw.boxes(batch, height, width, contents)
    for boxed in (None, box):
        seeds = slow.seed_label(cam, present, **BETAS, boxes=boxed)
        same(labels.seed_label(cam, present, **BETAS, valid_box=boxed), seeds)
        same(
            labels.region_mask(cam, present, **BETAS, valid_box=boxed),
            slow.region_mask(cam, present, **BETAS, boxes=boxed),
        )
    if contents == "nothing inside the box":
        assert (seeds == IGNORE).all()
    same(labels.eval_label(cam, present, beta=0.25), slow.seed_label(cam, present, 0.25, 0.25 + 1e-9, None))

    grid = draw.pick(1, height + 1), draw.pick(1, width + 1)
    resized = torch.nn.functional.interpolate(cam, size=grid, mode="bilinear", align_corners=False)
    expected = slow.seed_label(resized, present, **BETAS, boxes=None)
    for b in range(batch):
        for i in range(grid[0]):
            for j in range(grid[1]):
                if not slow.inside(box[b], *((2 * n + 1) * side // (2 * cells) for n, side, cells in (
                    (i, height, grid[0]), (j, width, grid[1])
                ))):  # fmt: skip
                    expected[b, i, j] = IGNORE
    ours = labels.token_label(cam, present, grid, **BETAS, valid_box=box)
    same(ours, expected)
    same(labels.affinity_mask(ours), slow.affinity_mask(ours))


@pytest.mark.parametrize("seed", range(12))
def test_labels_after_par(seed):
    draw, contents = Draw(100 + seed), CONTENTS[seed % len(CONTENTS)]
    batch, classes, height, width = draw.pick(1, 3), draw.pick(1, 5), draw.pick(5, 18), draw.pick(5, 18)
    images = draw.rand(batch, 3, height, width)
    coarse = draw.rand(batch, classes, draw.pick(1, 4), draw.pick(1, 4))
    cam = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    present, box = draw.image_labels(batch, classes, contents), draw.boxes(batch, height, width, contents)
    settings = {"iterations": draw.pick(0, 4), "dilations": (1, draw.pick(2, 9)), "scale": (0.5, 1.0, 0.3)[seed % 3]}
    ours = labels.pseudo_label(images, cam, present, **BETAS, valid_box=box, **settings)
    same(ours, slow.pseudo_label(images, cam, present, **BETAS, boxes=box, **settings))


@pytest.mark.parametrize("seed", range(8))
def test_par(seed):
    draw = Draw(200 + seed)
    images = draw.rand(draw.pick(1, 3), 3, draw.pick(1, 10), draw.pick(1, 10))
    if seed % 3 == 0:
        images = images.round()  # many equal colours
    masks = draw.rand(len(images), draw.pick(1, 4), draw.pick(1, 12), draw.pick(1, 12))
    settings = {"iterations": draw.pick(0, 3), "dilations": tuple({1, draw.pick(1, 14)})}
    assert_close(par.refine(images, masks, **settings), slow.refine(images, masks, **settings), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(16))
def test_crops(seed):
    draw = Draw(300 + seed)
    batch, height, width, n = draw.pick(1, 4), draw.pick(3, 20), draw.pick(3, 20), draw.pick(1, 9)
    size = draw.pick(1, min(height, width) + 1)
    region = torch.randint(0, 3, (batch, height, width), generator=draw.generator)
    region = {1: region * 0, 2: region * 0 + 2, 3: region.clamp(max=1)}.get(seed % 4, region)
    box = draw.boxes(batch, height, width, CONTENTS[seed % len(CONTENTS)])
    boxes = crops.sample_crops(region, n_crops=n, crop_size=size, generator=draw.generator, valid_box=box)

    half = size // 2
    for b in range(batch):
        whole = [(y, x) for y in range(half, half + height - size + 1) for x in range(half, half + width - size + 1)]
        inside = [place for place in whole if slow.inside(box[b], *place)] or whole
        wanted = [place for place in inside if region[b][place] <= 1]
        allowed = wanted if len(wanted) >= n else inside
        drawn = [(y + half, x + half) for y, x in zip(boxes.top[b].tolist(), boxes.left[b].tolist(), strict=True)]
        assert set(drawn) <= set(allowed)
        assert len(set(drawn)) == n or len(allowed) < n

    images = draw.rand(batch, 3, height, width)
    assert_close(crops.cut_crops(images, *boxes, size), slow.cut_crops(images, *boxes, size), rtol=0, atol=0)
    for double in (True, False):
        values = region if double else region.clamp(max=1)
        expected = torch.tensor(
            [
                [slow.ratio_of_crop(values[b], y, x, size) for y, x in zip(ys, xs, strict=True)]
                for b, (ys, xs) in enumerate(zip(boxes.top.tolist(), boxes.left.tolist(), strict=True))
            ]
        )
        same(crops.crop_flags(region, *boxes, size, foreground_counts_double=double), expected > 0.2)


@pytest.mark.parametrize("seed", range(8))
def test_cam(seed):
    """Also images whose size is no multiple of the patch of 8, at scales that make other sizes of it."""
    draw, contents = Draw(400 + seed), CONTENTS[seed % 5]
    model = small_model(seed, dropped_border=bool(seed % 2))
    images = 2 * draw.rand(draw.pick(1, 3), 3, draw.pick(16, 30), draw.pick(16, 30)) - 1
    scales, flip = ((1.0, 0.5), (0.75,), (1.3, 1.0))[seed % 3], seed % 4 != 3
    present = draw.image_labels(len(images), K, contents)
    given = present if seed % 4 else None
    found = multi_scale_cam(model, images, scales=scales, flip=flip, image_labels=given)

    def whole_patches(length):
        return length // 8 * 8 if model.dropped_border else (length + 4) // 8 * 8

    def tokens(image, which):
        height, width = map(whole_patches, image.shape[1:])
        if model.dropped_border:
            image = image[:, :height, :width]
        elif image.shape[1:] != (height, width):
            image = reference_model.resize(image, (height, width), "bilinear")
        parts = slow_tokens(model, image)
        return parts[which], parts[3]

    sizes = {scale: tuple(int(scale * side) for side in images.shape[2:]) for scale in scales}
    if not model.dropped_border:
        sizes = {scale: tuple(map(whole_patches, size)) for scale, size in sizes.items()}
    with torch.no_grad():
        for ours, weight, which in (
            (found.cam, model.classifier.weight, 1),
            (found.aux_cam, model.aux_classifier.weight, 2),
        ):
            theirs = reference_model.multi_scale_cam(
                lambda image, which=which: tokens(image, which), weight, images, scales, flip, sizes
            )
            assert_close(ours, theirs if given is None else theirs * present[:, :, None, None])
