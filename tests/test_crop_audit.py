"""The audit of crops against loops, and the logits of CTC against the training step's loss."""

import math

import numpy as np
import pytest
import reference_audit as slow
import torch
from small_config import small_recipe, stirred_model
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core import crops, labels
from toco_core.analysis import crop_audit as audit
from toco_core.analysis.label_quality import ImageCAMs, cams_of_split
from toco_core.config import override
from toco_core.data import VOCFolder, training_views
from toco_core.errors import ToCoError
from toco_core.losses import ctc_loss
from toco_core.objective import Step, StepInput, objective
from toco_core.train.batches import view_options

K = 3
IMAGE_LABELS = {"img_0": [1, 0, 1], "img_1": [0, 1, 0], "img_2": [0, 0, 0]}


@pytest.fixture(scope="module")
def model():
    return stirred_model(K)


@pytest.fixture(scope="module")
def config():
    return override(small_recipe(), crop_size=24, local_size=10, n_local=5, beta_l=0.3, beta_h=0.6, temperature=0.7)


@pytest.fixture(scope="module")
def items(model, config, tmp_path_factory):
    root = write_voc_folder(tmp_path_factory.mktemp("crops") / "voc", n=3)
    return cams_of_split(model, VOCFolder(root, "train", labels=IMAGE_LABELS), config)


def test_foreground_share_equals_loops():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([0, 0, 1, 3, 255], dtype=torch.uint8)[torch.randint(0, 5, (2, 13, 19), generator=g)]
    mask[1, :6, :6] = 255
    top, left = torch.tensor([[0, 8, 3], [0, 1, 4]]), torch.tensor([[14, 0, 7], [0, 13, 2]])
    found = audit.foreground_share(mask, top, left, 5)
    wanted = [[slow.foreground_share(mask[b], int(top[b, v]), int(left[b, v]), 5) for v in range(3)] for b in range(2)]
    assert_close(found, torch.tensor(wanted), equal_nan=True)
    assert math.isnan(wanted[1][0]) and not math.isnan(sum(wanted[0]))


def test_drawn_crops_equal_loops(items, config):
    """Place by place: the generator is asked in the same order. Images are stretched to a square, so masks are too."""
    for mirrored in (False, True):
        drawn = audit.draw_crops(items, config, draws=2, seed=5, mirrored=mirrored)
        assert drawn.ratio.shape == drawn.share.shape == (3, 2, 5)
        generator = torch.Generator().manual_seed(5)
        for i, item in enumerate(items):
            region = labels.region_mask(item.aux_cam, item.present, beta_l=0.3, beta_h=0.6).expand(2, -1, -1)
            boxes = crops.sample_crops(region, n_crops=5, crop_size=10, generator=generator)
            mask = audit.mask_at(item)[0]
            assert mask.shape == (24, 24)
            for r in range(2):
                for v in range(5):
                    top, left = int(boxes.top[r, v]), int(boxes.left[r, v])
                    values = region[0, top : top + 10, left : left + 10].double()
                    assert_close(drawn.ratio[i, r, v].double(), values.mean())
                    seen = mask.flip(1) if mirrored else mask
                    share = slow.foreground_share(seen, top, left, 10)
                    assert_close(float(drawn.share[i, r, v]), share, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert drawn.ratio[2].eq(0).all()  # an image without class has no activation


def test_single_count_of_foreground(items, config):
    single = audit.draw_crops(items, override(config, foreground_counts_double=False))
    double = audit.draw_crops(items, config)
    assert single.ratio.max() <= 1 and (double.ratio >= single.ratio).all() and (double.ratio > single.ratio).any()


def test_crop_scores_equal_loops():
    g = torch.Generator().manual_seed(1)
    ratio, share = torch.rand(4, 3, 6, generator=g), torch.rand(4, 3, 6, generator=g)
    share[share > 0.9] = float("nan")
    ratio[0, 0], ratio[1, 1] = 0.1, 0.9  # draws without a positive, without a negative
    for threshold, least in ((0.5, 0.3), (0.2, 0.6), (2.0, 0.3), (-1.0, 0.0)):
        found = audit.crop_scores(audit.DrawnCrops(ratio, share), threshold=threshold, least=least)
        wanted = slow.crop_scores(ratio.tolist(), share.tolist(), threshold, least)
        for name, value in found._asdict().items():
            assert_close(value, wanted[name], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)
    assert math.isnan(found.negative_right)


def test_a_faithful_region_mask_is_never_wrong(config):
    """A CAM that is the mask itself: every positive shows the object, every negative does not."""
    mask = np.zeros((24, 24), np.uint8)
    mask[:9, 15:] = 1
    cam = torch.from_numpy((mask > 0).astype(np.float32))[None, None]
    item = ImageCAMs("one", np.zeros((24, 24, 3), np.uint8), mask, torch.zeros(1, 3, 24, 24), np.array([1]), cam, cam)
    setting = override(config, local_size=8)
    scores = audit.crop_scores(audit.draw_crops([item], setting, draws=40), threshold=0.2, least=0.1)
    assert scores.positive_right == scores.negative_right == 1 and 0 < scores.positive < 0.5
    mirrored = audit.crop_scores(audit.draw_crops([item], setting, draws=40, mirrored=True), threshold=0.2, least=0.1)
    assert mirrored.positive_right < 0.2


def test_separation():
    assert audit.separation([2, 3], [0, 1]) == 1 and audit.separation([0, 1], [2, 3]) == 0
    positive, negative = [0.1, 0.5, 0.5, 0.9], [0.5, 0.2, 0.7]
    assert_close(audit.separation(positive, negative), slow.separation(positive, negative))
    assert math.isnan(audit.separation([], [1.0]))


def test_nothing_to_draw_from(config):
    with pytest.raises(ToCoError, match="no image to draw crops from"):
        audit.draw_crops([], config)


# ---- one image


def test_look_draws_as_the_audit_does(model, items, config):
    for seed in (0, 3):
        found = audit.look_at_crops(model, items[0], config, seed=seed)
        drawn = audit.draw_crops(items[:1], config, draws=1, seed=seed)
        assert_close(found.ratio, drawn.ratio[0, 0])
        assert_close(found.share, drawn.share[0, 0], equal_nan=True)
        assert torch.equal(found.is_positive, found.ratio > config.crops.positive_threshold)
        for v in range(5):
            top, left = int(found.boxes.top[0, v]), int(found.boxes.left[0, v])
            np.testing.assert_array_equal(found.crops[v], found.image[top : top + 10, left : left + 10])
    other = audit.look_at_crops(model, items[0], config, seed=4)
    assert not torch.equal(other.boxes.top, found.boxes.top)


@pytest.mark.parametrize(
    ("index", "variant"), [(0, {}), (1, {}), (2, {}), (1, {"local_resized": True, "ctc_cosine": True})]
)
def test_logits_are_those_of_the_training_step(model, items, config, index, variant):
    """The loss of the shown logits equals the loss that `objective` makes of the same views; img_2 has no class."""
    item, config = items[index], override(config, **variant)
    found = audit.look_at_crops(model, item, config, seed=2)
    views = training_views(item.image, crop_size=(24, 24), rng=np.random.default_rng(2), **view_options(config, model))
    np.testing.assert_array_equal(found.global_view, views.global_view.transpose(1, 2, 0))
    image_labels = torch.zeros(1, K, dtype=torch.float64)
    image_labels[0, item.classes - 1] = 1
    image = model.normalise(item.unit)
    second = model.normalise(torch.from_numpy(views.global_view)[None].double() / 255)
    batch = StepInput(image, second, image, image_labels, torch.tensor([[0, 24, 0, 24]]))
    weights = dict.fromkeys(("cls", "aux_cls", "ptc", "seg", "energy"), 0.0) | {"ctc": 1.0}
    step = Step(model, batch, config, weights=weights, boxes=found.boxes)
    assert torch.equal(step.is_positive[0, 2:], found.is_positive)
    assert torch.equal(step.region_mask[0], torch.from_numpy(found.region))
    as_tokens = found.logits.double()[None] * config.loss.temperature  # student . teacher, with teacher = unit vectors
    loss = ctc_loss(as_tokens, torch.eye(2).double()[None], step.is_positive, temperature=config.loss.temperature)
    assert_close(loss.float(), objective(step).terms["ctc"].detach().float(), rtol=1e-5, atol=1e-6)
    assert found.logits.shape == (7, 2) and found.logits.std() > 0
