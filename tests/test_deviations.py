"""Every option of `ReleaseBehaviour` does what it says, where the training step, the loop or the evaluation uses it."""

import dataclasses

import numpy as np
import pytest
import torch
from small_config import small_recipe
from torch.testing import assert_close
from voc_folder import write_voc_folder

import toco_core.evaluation.evaluate as evaluation
from toco_core import losses
from toco_core.config import ReleaseBehaviour, override
from toco_core.crops import CropBoxes
from toco_core.data import training_views
from toco_core.evaluation.evaluate import merged_label
from toco_core.model import ToCo
from toco_core.objective import Step, StepInput, objective
from toco_core.train.batches import view_options
from toco_core.train.loop import train

BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
OFF = ReleaseBehaviour(**{f.name: False for f in dataclasses.fields(ReleaseBehaviour)})
B, K, H, W, CROP = 2, 4, 40, 56, 16
THRESHOLD = 0.5  # of a positive view: between what one region is worth in two ways
PTC, CTC = {"ptc": 1.0}, {"ctc": 1.0}


def only(**options):
    """A small experiment with every option of the release off but these."""
    sizes = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}
    small = {"backbone": BACKBONE, "pretrained": False, "layer": 2, "crop_size": W, "n_local": 3, "local_size": CROP}
    small["positive_threshold"] = THRESHOLD
    return override(small_recipe(), release=dataclasses.replace(OFF, **options), par_iterations=1, **small, **sizes)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = ToCo(only().model, K)
    torch.manual_seed(0)  # whatever timm drew
    for parameter in (model.classifier.weight, model.aux_classifier.weight):
        parameter.data = torch.randn_like(parameter)
    return model


def batch(model, *, boxes=None, image_labels=None, images=None):
    g = torch.Generator().manual_seed(1)
    views = [torch.rand(B, 3, H, W, generator=g) for _ in range(3)]
    views[0] = views[0] if images is None else images
    boxes = torch.tensor([[0, H, 0, W]] * B) if boxes is None else boxes
    image_labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]]) if image_labels is None else image_labels
    return StepInput(*(model.normalise(view) for view in views), image_labels, boxes)


def step_of(model, inputs, weights, *, boxes=None, **options):
    weights = dict.fromkeys(("cls", "aux_cls", "ptc", "ctc", "seg", "energy"), 0.0) | {"cls": 1.0} | weights
    generator = torch.Generator().manual_seed(2)
    return Step(model, inputs, only(**options), weights=weights, boxes=boxes, generator=generator)


def run(*arguments, **options):
    return objective(step_of(*arguments, **options))


def views_of(image, seeds, **options):
    """The training views of an image, seed by seed, at its own scale."""
    config = override(only(**options), scale_range=(1.0, 1.0))
    settings = view_options(config, ToCo(config.model, K))
    return [training_views(image, crop_size=W, rng=np.random.default_rng(seed), **settings) for seed in range(seeds)]


def trained(folder, *, steps=1, on_record=None, **options):
    """A run of `steps` on some images; its state is `run.load()`."""
    root = folder / "voc"
    if not root.exists():
        write_voc_folder(root, n=5, splits={"train": range(3), "val": range(3, 5)})
    rates = {"lr": 1e-2, "warmup_steps": 1, "warmup_ratio": 1.0}
    config = override(only(**options), steps=steps, batch_size=2, log_interval=1, cam_scales=(1.0,), **rates)
    config = override(config, dataset=str(root), out_dir=str(folder / "runs"))
    return train(config, progress=False, on_record=on_record)


# ---- off by default: slips


def test_mirrored_valid_box():
    image = np.full((W // 2, W // 2, 3), 200, np.uint8)

    def inside(views):
        top, bottom, left, right = views.valid_box
        return bool((views.image[:, top:bottom, left:right].max(0) > 0).all())

    assert all(map(inside, views_of(image, 12, black_padding=True)))
    assert 0 < sum(map(inside, views_of(image, 12, black_padding=True, mirrored_valid_box=True))) < 12


def test_independent_local_image():
    """An image whose left half is dark: does the local image have it on the same side?"""
    image = np.full((W, W, 3), 30, np.uint8)
    image[:, W // 2 :] = 220

    def aligned(views):
        sides = [view[:, :, : W // 2].mean() > view[:, :, W // 2 :].mean() for view in (views.image, views.local_image)]
        return sides[0] == sides[1]

    assert all(map(aligned, views_of(image, 12)))
    assert all(map(aligned, views_of(image, 12, mirrored_valid_box=True)))
    assert 0 < sum(map(aligned, views_of(image, 12, independent_local_image=True))) < 12


def test_pixel_box_on_tokens(model):
    """20 pixels of padding at the top are more than the grid's 5 rows."""
    inputs = batch(model, boxes=torch.tensor([[20, H, 0, W], [0, H, 0, W]]))
    ours, theirs = (step_of(model, inputs, PTC, pixel_box_on_tokens=on).token_label for on in (False, True))
    assert (ours[0, 3:] != losses.IGNORE).any() and (ours[0, :2] == losses.IGNORE).all()
    assert (theirs[0] == losses.IGNORE).all()
    assert torch.equal(ours[1], theirs[1])


def test_nan_segmentation_loss(model):
    """No image has a class, so nothing is foreground."""
    inputs = batch(model, image_labels=torch.zeros(B, K))
    assert run(model, inputs, {"seg": 1.0}).terms["seg"].isfinite()
    assert run(model, inputs, {"seg": 1.0}, nan_segmentation_loss=True).terms["seg"].isnan()


def test_crops_in_padding(model, monkeypatch):
    inputs = batch(model, boxes=torch.tensor([[24, H, 32, W]] * B))
    centres = {}
    for on in (False, True):
        seen = []

        def cut(images, top, left, size, seen=seen):
            seen.append((top, left))
            return images[:, None, :, :size, :size].expand(-1, top.shape[1], -1, -1, -1)

        monkeypatch.setattr("toco_core.crops.cut_crops", cut)
        run(model, inputs, CTC, crops_in_padding=on)
        top, left = seen[0]
        centres[on] = (top + CROP // 2 >= 24) & (left + CROP // 2 >= 32)
    assert centres[False].all()
    assert not centres[True].all()


def test_truncated_denormalisation(model, monkeypatch):
    grey = torch.arange(256).repeat(B * 3 * H * W // 256 + 1)[: B * 3 * H * W].view(B, 3, H, W) / 255
    seen = {}
    for on in (False, True):

        def label(images, *_, on=on, **__):
            seen[on] = images
            return torch.zeros(B, H, W, dtype=torch.long)

        monkeypatch.setattr("toco_core.labels.pseudo_label", label)
        run(model, batch(model, images=grey), {"seg": 1.0}, truncated_denormalisation=on)
    assert_close(seen[False], grey)
    too_low = (grey - seen[True]).mul(255).round()
    assert set(too_low.unique().tolist()) == {0.0, 1.0}


def test_dropped_border(tmp_path):
    images = torch.randn(1, 3, 32, 47)
    grids = [trained(tmp_path, dropped_border=on).model.encode(images).grid for on in (False, True)]
    assert grids == [(4, 6), (4, 5)]


def test_ptc_constant(model):
    """Padding leaves one token per image, so there is no pair."""
    inputs = batch(model, boxes=torch.tensor([[0, 8, 0, 8]] * B))
    assert run(model, inputs, PTC).terms["ptc"].item() == 0
    assert run(model, inputs, PTC, ptc_constant=True).terms["ptc"].item() == 0.5


# ---- on by default: what the published results are made of


def test_foreground_counts_double(model):
    """Flags differ exactly where the doubled mean passes the threshold and the plain share does not."""
    inputs, boxes = batch(model), CropBoxes(*(torch.randint(0, H - CROP, (B, 60)) for _ in range(2)))
    plain, double = (step_of(model, inputs, CTC, boxes=boxes, foreground_counts_double=on) for on in (False, True))
    region = plain.region_mask
    for found, values in ((plain, region.clamp(max=1)), (double, region)):
        for b in range(B):
            for v, (top, left) in enumerate(zip(*(corner[b].tolist() for corner in boxes), strict=True)):
                mean = values[b, top : top + CROP, left : left + CROP].double().mean()
                assert found.is_positive[b, 2 + v] == (mean > THRESHOLD)
    assert not torch.equal(plain.is_positive, double.is_positive)


def test_ctc_negatives_only_term(model):
    inputs, boxes = batch(model), CropBoxes(torch.zeros(B, 3, dtype=torch.long), torch.zeros(B, 3, dtype=torch.long))
    without, with_term = (run(model, inputs, CTC, boxes=boxes, ctc_negatives_only_term=on) for on in (False, True))
    assert with_term.terms["ctc"] > without.terms["ctc"]


def test_average_before_teacher(tmp_path):
    """On step 0 heads are equal either way; on step 1 the teacher knows the student's first update, or not yet."""
    ctc = {}
    for on in (False, True):
        records = []
        trained(tmp_path, steps=2, on_record=records.append, average_before_teacher=on)
        ctc[on] = [record["ctc"] for record in records if "ctc" in record]
    assert ctc[False][0] == ctc[True][0]
    assert ctc[False][1] != ctc[True][1]


def test_rate_jump(tmp_path):
    """Step 1 of 2 follows a warm-up of one step: the full rate, or what the polynomial says of half the way."""
    rates = []
    for on in (False, True):
        state = trained(tmp_path, steps=2, rate_jump=on).run.load()
        rates += [group["lr"] / group["base_lr"] for group in state["optimizer"]["param_groups"][:1]]
    assert rates == pytest.approx([1.0, 0.5**0.9])


def test_decay_all(tmp_path):
    decays = []
    for on in (False, True):
        groups = trained(tmp_path, decay_all=on).run.load()["optimizer"]["param_groups"]
        decays.append({group["weight_decay"] for group in groups})
    assert decays == [{0.0, 0.01}, {0.01}]


def test_always_blurred():
    """Noise loses its contrast by blur; half of the sigmas drawn are wide enough to see."""
    noise = np.random.default_rng(0).integers(0, 256, (W, W, 1), np.uint8).repeat(3, axis=2)

    def steps(**options):
        views = views_of(noise, 10, **options)
        return np.median([np.abs(np.diff(view.image.astype(float))).mean() for view in views])

    assert steps(always_blurred=True) < 0.6 * steps()


def test_black_padding(model):
    image = np.full((W // 2, W // 2, 3), 200, np.uint8)
    for on in (False, True):
        (views,) = views_of(image, 1, black_padding=on)
        top, bottom, left, right = views.valid_box
        outside = torch.ones(W, W, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert outside.any()
        padding = torch.from_numpy(views.image)[:, outside].float() / 255
        if on:
            assert not padding.any()
        else:
            assert model.normalise(padding[None, :, None]).abs().max() < 0.02


def test_square_evaluation(tmp_path):
    protocols = [trained(tmp_path, square_evaluation=on).validation.protocol for on in (False, True)]
    assert "native size" in protocols[0]
    assert f"{W} x {W}" in protocols[1]


def test_max_over_scales(tmp_path, monkeypatch):
    """On average class 0 wins; the one scale that is most certain says class 1."""
    votes = [torch.tensor(v).view(1, 3, 1, 1).expand(1, 3, 2, 3) for v in ([1.0, 0, 0], [1.0, -9, 0], [-1.0, 5, 0])]
    assert (merged_label(votes, (4, 5), max_over_scales=False) == 0).all()
    assert (merged_label(votes, (4, 5)) == 1).all()
    seen = []
    monkeypatch.setattr(
        evaluation, "merged_label", lambda *a, max_over_scales: seen.append(max_over_scales) or merged_label(*a)
    )
    for on in (False, True):
        trained(tmp_path, max_over_scales=on)
    assert seen == [False, False, True, True]


def test_several_scales_of_segmentation_are_mirrored_and_summed(model):
    """Each scale alone: the decoder's logits of the resized images and, turned back, of their mirror images."""
    images = torch.randn(B, 3, H, W)
    with torch.no_grad():
        maps = evaluation.segmentation_maps(model, images, (1.0, 0.5))
        for scale, found in zip((1.0, 0.5), maps, strict=True):
            size = model.fitted_size(int(scale * H), int(scale * W))
            views = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
            wanted = model(views).seg_logits + model(views.flip(-1)).seg_logits.flip(-1)
            assert_close(found, wanted)


def test_every_option_has_its_test():
    for field in dataclasses.fields(ReleaseBehaviour):
        assert f"test_{field.name}" in globals(), field.name
