"""Labels from CAM against loops over pixels, over odd shapes and odd contents."""

import pytest
import reference_labels as slow
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from toco_core import labels
from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.train.budget import Allocations

BETAS = {"beta_l": 0.25, "beta_h": 0.7}


def example(seed=0, batch=3, classes=4, size=(7, 11), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    cam = torch.rand(batch, classes, *size, generator=g, dtype=dtype)
    cam = (cam * 20).round() / 20  # so that classes tie and values lie exactly on thresholds
    image_labels = (torch.rand(batch, classes, generator=g) < 0.5).float()
    height, width = size
    box = torch.tensor([[0, height, 0, width], [1, height - 2, 2, width], [3, 3, 0, width]])[:batch]
    return cam, image_labels, box


def same(ours, theirs):
    assert_close(ours.long(), theirs.long(), rtol=0, atol=0)


CASES = [
    {"seed": 0},
    {"seed": 1, "classes": 1, "size": (1, 5)},
    {"seed": 2, "batch": 1, "classes": 6, "size": (9, 4)},
    {"seed": 3, "batch": 2, "classes": 3, "size": (8, 13), "dtype": torch.float32},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("contents", ["random", "no class", "all classes"])
@pytest.mark.parametrize("boxed", [False, True])
def test_seed_label_and_region_mask_equal_loops(case, contents, boxed):
    cam, image_labels, box = example(**case)
    if contents != "random":
        image_labels.fill_(contents == "all classes")
    betas = {"beta_l": 0.25, "beta_h": 0.75}  # exact in floating point, so that ties are ties
    box = box if boxed else None
    same(
        labels.seed_label(cam, image_labels, **betas, valid_box=box),
        slow.seed_label(cam, image_labels, **betas, boxes=box),
    )
    same(
        labels.region_mask(cam, image_labels, **betas, valid_box=box),
        slow.region_mask(cam, image_labels, **betas, boxes=box),
    )
    expected = slow.seed_label(cam, image_labels, 0.5, 0.5 + 1e-9, None)  # nothing lies between the two
    same(labels.eval_label(cam, image_labels, beta=0.5), expected)


def test_thresholds_include_their_ends():
    cam = torch.tensor([0.0, 0.25, 0.26, 0.74, 0.75, 1.0]).view(1, 1, 1, 6)
    one = torch.ones(1, 1)
    same(labels.seed_label(cam, one, beta_l=0.25, beta_h=0.75), torch.tensor([[[0, 0, IGNORE, IGNORE, 1, 1]]]))
    same(labels.region_mask(cam, one, beta_l=0.25, beta_h=0.75), torch.tensor([[[0, 0, 1, 1, 2, 2]]]))
    same(labels.eval_label(cam, one, beta=0.75), torch.tensor([[[0, 0, 0, 0, 0, 1]]]))


def test_image_labels_of_any_type():
    cam, image_labels, _ = example()
    expected = labels.seed_label(cam, image_labels, **BETAS)
    for kind in (torch.bool, torch.long, torch.uint8, torch.float64):
        same(labels.seed_label(cam, image_labels.to(kind), **BETAS), expected)
    assert_close(labels.valid_cam(cam, image_labels.bool()), cam * image_labels[:, :, None, None])


@pytest.mark.parametrize("seed", range(3))
def test_pseudo_label_equals_two_refinements_with_a_background_channel(seed):
    g = torch.Generator().manual_seed(seed)
    size = (18, 27)
    images = torch.rand(3, 3, *size, generator=g, dtype=torch.float64)
    cam = torch.nn.functional.interpolate(
        torch.rand(3, 4, 4, 5, generator=g, dtype=torch.float64), size=size, mode="bilinear"
    )
    image_labels = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]]).float()
    box = torch.tensor([[0, 18, 0, 27], [2, 15, 0, 27], [0, 18, 5, 20]])
    settings = {"iterations": 2, "dilations": (1, 3), "scale": 0.5}
    ours = labels.pseudo_label(images, cam, image_labels, **BETAS, valid_box=box, **settings)
    same(ours, slow.pseudo_label(images, cam, image_labels, **BETAS, boxes=box, **settings))
    assert {0, 1, IGNORE} <= set(ours.unique().tolist())


def test_refined_labels_are_what_pseudo_labels_are_made_of():
    g = torch.Generator().manual_seed(5)
    images, cam = torch.rand(3, 3, 18, 27, generator=g), torch.rand(3, 4, 18, 27, generator=g)
    image_labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    settings, betas = {"iterations": 2, "dilations": (1, 3), "scale": 0.5}, (0.7, 0.25, 0.5)
    found = labels.refined_labels(images, cam, image_labels, betas=betas, **settings)
    assert found.shape == (3, 3, 18, 27) and not found[:, 1].any()
    one = dict(zip(betas, found, strict=True))
    for low, high in ((0.25, 0.5), (0.5, 0.7), (0.25, 0.7)):
        wanted = slow.pseudo_label(images, cam, image_labels, low, high, boxes=None, **settings)
        same(labels.with_uncertain(low=one[low], high=one[high]), wanted)
    assert not torch.equal(one[0.25], one[0.5]) and not torch.equal(one[0.5], one[0.7])
    assert labels.refined_labels(images, cam, image_labels, betas=(), **settings).shape == (0, 3, 18, 27)


def test_with_uncertain():
    low, high = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 1]])
    same(labels.with_uncertain(low=low, high=high), torch.tensor([[0, IGNORE, 1, 1]]))


def test_pseudo_label_of_images_without_class():
    images, cam = torch.rand(2, 3, 16, 12), torch.rand(2, 3, 16, 12)
    none = torch.zeros(2, 3)
    same(labels.pseudo_label(images, cam, none, **BETAS), torch.zeros(2, 16, 12))
    box = torch.tensor([[0, 16, 0, 12], [4, 9, 0, 12]])
    boxed = labels.pseudo_label(images, cam, none, **BETAS, valid_box=box)
    same(boxed, torch.where(labels.inside_box(box, (16, 12)), 0, IGNORE))


def test_pseudo_label_does_not_depend_on_the_rest_of_the_batch_or_on_autocast():
    images = torch.rand(3, 3, 20, 14, generator=torch.Generator().manual_seed(0))
    cam = torch.rand(3, 5, 20, 14, generator=torch.Generator().manual_seed(1))
    image_labels = torch.tensor([[0, 0, 1, 0, 0], [1, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).float()
    together = labels.pseudo_label(images, cam, image_labels, **BETAS)
    for b in range(3):
        part = slice(b, b + 1)
        same(labels.pseudo_label(images[part], cam[part], image_labels[part], **BETAS), together[part])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(labels.pseudo_label(images, cam, image_labels, **BETAS), together)
    assert not cam.requires_grad and not together.requires_grad


def test_token_label_is_the_seed_label_of_the_resized_cam():
    cam, image_labels, _ = example(size=(32, 48))
    resized = torch.nn.functional.interpolate(cam, size=(4, 6), mode="bilinear", align_corners=False)
    for present in (image_labels, torch.zeros_like(image_labels), torch.ones_like(image_labels)):
        same(
            labels.token_label(cam, present, (4, 6), **BETAS),
            slow.seed_label(resized, present, **BETAS, boxes=None),
        )


def test_a_refined_token_shows_what_half_of_its_pixels_show():
    """Pixel by pixel: 5 x 4 tokens of 6 x 8 pixels; the pseudo label's padding is uncertain."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 30, 32, generator=generator)
    coarse = torch.rand(2, 4, 5, 4, generator=generator)
    cam = F.interpolate(coarse, size=(30, 32), mode="bicubic").clamp(0, 1)
    present = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    options = {"beta_l": 0.35, "beta_h": 0.55, "iterations": 3, "dilations": (1, 2), "scale": 0.5}
    options["valid_box"] = torch.tensor([[0, 30, 0, 32], [7, 30, 0, 29]])
    pixels = labels.pseudo_label(images, cam, present, **options)
    found = labels.refined_token_label(images, cam, present, (5, 4), **options)
    for b in range(2):
        for y in range(5):
            for x in range(4):
                inside = pixels[b, 6 * y : 6 * y + 6, 8 * x : 8 * x + 8].flatten().tolist()
                shares = {label: inside.count(label) / 48 for label in (0, 1, 2, 3, 4)}
                best = max(shares, key=lambda label: (shares[label], -label))
                assert found[b, y, x] == (best if shares[best] >= 0.5 else 255), (b, y, x)
    assert {0, 2, 255} <= set(found.unique().tolist()) and found[1, 0].eq(255).all()
    assert ({1, 4} & set(found[0].unique().tolist())) and not torch.equal(
        found, labels.token_label(cam, present, (5, 4), beta_l=0.35, beta_h=0.55, valid_box=options["valid_box"])
    )


def test_token_label_scales_the_box_unless_told_not_to():
    cam, one = torch.ones(2, 1, 64, 96), torch.ones(2, 1)
    box = torch.tensor([[0, 64, 0, 96], [32, 64, 0, 40]])  # 16 pixels per token: rows 2.. and columns ..2.5
    fixed = labels.token_label(cam, one, (4, 6), **BETAS, valid_box=box)
    expected = torch.full((2, 4, 6), 1)
    expected[1, :2] = IGNORE
    expected[1, :, 2:] = IGNORE  # the centre of column 2 lies at 40, just outside
    same(fixed, expected)
    released = labels.token_label(cam, one, (4, 6), **BETAS, valid_box=box, pixel_box_on_tokens=True)
    same(released[0], expected[0])
    assert (released[1] == IGNORE).all()  # more padding at the top than the grid has tokens: nothing is left


def test_a_box_at_its_own_scale_is_a_slice():
    for top, bottom, left, right in ((0, 7, 0, 11), (2, 5, 3, 4), (3, 3, 0, 11)):
        expected = torch.zeros(1, 7, 11, dtype=torch.bool)
        expected[:, top:bottom, left:right] = True
        box = torch.tensor([[top, bottom, left, right]], dtype=torch.int16)
        assert_close(labels.inside_box(box, (7, 11)), expected)


@pytest.mark.parametrize("contents", ["random", "all ignore", "one valid", "one class"])
def test_affinity_mask_equals_loops_over_pairs(contents):
    label = torch.randint(0, 4, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    label[label == 3] = IGNORE
    if contents == "all ignore":
        label.fill_(IGNORE)
    if contents == "one valid":
        label.fill_(IGNORE)[1, 2, 3] = 0
    if contents == "one class":
        label.fill_(2)
    same(labels.affinity_mask(label), slow.affinity_mask(label))


def test_upsampled_argmax_equals_argmax_after_resizing():
    scores = torch.randn(2, 5, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resized = torch.nn.functional.interpolate(scores, size=(17, 31), mode="bilinear", align_corners=False)
    same(labels.upsampled_argmax(scores, (17, 31)), resized.argmax(1))
    ties = torch.zeros(1, 3, 2, 2)
    same(labels.upsampled_argmax(ties, (2, 2)), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("max_over_scales", [True, False])
def test_merged_argmax_equals_argmax_of_merged_logits_and_holds_few_maps(max_over_scales):
    """Of COCO's 81 classes at 6000 x 4000 pixels all maps would be 8 GB, six times over for three scales."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 30, *size, generator=generator) for size in ((6, 9), (8, 11), (9, 14))]
    resized = [torch.nn.functional.interpolate(m, size=(170, 310), mode="bilinear") for m in maps]
    whole = torch.stack(resized).amax(0) if max_over_scales else torch.stack(resized).mean(0)
    assert torch.equal(labels.merged_logits(maps, (170, 310), max_over_scales=max_over_scales), whole)
    with Allocations() as counted:
        found = labels.merged_argmax(maps, (170, 310), max_over_scales=max_over_scales)
    same(found, whole.argmax(1))
    assert counted.most < whole.nbytes / 2


@pytest.mark.parametrize("betas", [(0.7, 0.25), (0.5, 0.5), (-0.1, 0.5), (0.3, 1.2)])
def test_wrong_thresholds_are_named(betas):
    cam, image_labels, _ = example()
    wrong = {"beta_l": betas[0], "beta_h": betas[1]}
    for call in (labels.seed_label, labels.region_mask):
        with pytest.raises(ToCoError, match=f"beta_l = {betas[0]}, beta_h = {betas[1]}"):
            call(cam, image_labels, **wrong)
    with pytest.raises(ToCoError, match="beta_l"):
        labels.pseudo_label(torch.rand(3, 3, 7, 11), cam, image_labels, **wrong)
    with pytest.raises(ToCoError, match="beta = 1.5"):
        labels.eval_label(cam, image_labels, beta=1.5)
    with pytest.raises(ToCoError, match="scale = 0"):
        labels.pseudo_label(torch.rand(3, 3, 7, 11), cam, image_labels, **BETAS, scale=0.0)


@pytest.mark.parametrize("side", [24, 600])
def test_images_are_refined_together_as_they_are_alone(side, monkeypatch):
    """Equally many classes go together as far as they fit; what an image gets does not depend on its company."""
    generator = torch.Generator().manual_seed(3)
    image_labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]])
    sizes = []
    build = labels.build_refiner

    def watched(*args, **settings):
        refine = build(*args, **settings)

        class Watched:
            scale = refine.scale

            def __call__(self, images, classes):
                sizes.append(len(images))
                return refine(images, classes)

        return Watched()

    monkeypatch.setattr(labels, "build_refiner", watched)
    images, cam = (torch.rand(6, 3, side, side // 2, generator=generator) for _ in range(2))
    options = {"beta_l": 0.3, "beta_h": 0.6, "iterations": 2, "dilations": (1, 2)}
    together = labels.pseudo_label(images, cam, image_labels, **options)
    assert sorted(sizes) == ([2, 3] if side == 24 else [1] * 5)
    for b in range(6):
        one = slice(b, b + 1)
        assert torch.equal(together[one], labels.pseudo_label(images[one], cam[one], image_labels[one], **options))
