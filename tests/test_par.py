"""PAR against loops over pixels, and what must hold of it whatever the image."""

import pytest
import reference_labels as slow
import torch
from torch.testing import assert_close

from toco_core import par
from toco_core.errors import ToCoError


def example(batch=2, channels=4, size=(13, 17), mask_size=(6, 9), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, *size, generator=g, dtype=dtype)
    images[:, :, : size[0] // 2] = images[:, :, : size[0] // 2].mul(4).round().div(4)  # also colours that are equal
    return images, torch.rand(batch, channels, *mask_size, generator=g, dtype=dtype)


@pytest.mark.parametrize(
    "case",
    [
        {"size": (13, 17), "mask_size": (6, 9), "dilations": (1, 2, 4), "iterations": 3},
        {"size": (9, 5), "mask_size": (9, 5), "dilations": (1,), "iterations": 2},
        {"size": (5, 8), "mask_size": (11, 3), "dilations": (3, 12), "iterations": 1},  # reaches beyond the image
    ],
)
def test_equals_loops_over_pixels(case):
    images, masks = example(size=case["size"], mask_size=case["mask_size"])
    settings = {"iterations": case["iterations"], "dilations": case["dilations"]}
    assert_close(par.refine(images, masks, **settings), slow.refine(images, masks, **settings), rtol=1e-10, atol=1e-12)


def test_the_vectorised_second_implementation_agrees_with_the_loops():
    images, masks = example()
    assert_close(slow.refine_with_unfold(images, masks, 2, (1, 3)), slow.refine(images, masks, 2, (1, 3)))


def test_equals_the_usual_way_with_the_default_dilations():
    images, masks = example(size=(40, 61), mask_size=(20, 31))
    assert_close(par.refine(images, masks), slow.refine_with_unfold(images, masks), rtol=1e-9, atol=1e-12)


def test_weights_sum_to_one_and_a_hundredth():
    images, _ = example()
    weights, offsets = par.affinity(images)
    assert len(offsets) == 48
    assert_close(weights.sum(0), torch.full_like(weights[0], 1.01))
    assert weights.min() > 0


def test_a_constant_grows_by_the_same_factor():
    images, masks = example()
    assert_close(par.refine(images, torch.ones_like(masks), iterations=5), torch.full((2, 4, 13, 17), 1.01**5).double())


def test_one_affinity_serves_several_masks():
    images, masks = example()
    weights, together = par.affinity(images, dilations=(1, 4)), par.refine(images, masks, dilations=(1, 4))
    for c in range(masks.shape[1]):
        assert_close(par.apply(weights, masks[:, c : c + 1]), together[:, c : c + 1])


def test_a_flat_image_is_no_division_by_zero():
    _, masks = example()
    flat = torch.full((2, 3, 13, 17), 0.3)
    weights, _ = par.affinity(flat)
    assert weights.isfinite().all()
    assert_close(weights[:, 0, 3, 5], weights[:, 1, 9, 2])
    lonely = flat.clone()
    lonely[0, 0, 6, 8] = 1.0  # its neighbours are all equal and all far from it
    assert par.refine(lonely, masks.float()).isfinite().all()
    images, _ = example()
    assert_close(par.affinity(images * 255).weights, par.affinity(images).weights, rtol=1e-5, atol=1e-8)


def test_scores_stay_on_their_side_of_an_edge():
    images = torch.zeros(1, 3, 20, 30)
    images[..., 14:] = 1.0
    images += 0.02 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 1, 20, 30)
    masks[..., 10:14] = 1.0
    refined = par.refine(images, masks, dilations=(1, 2, 4))
    assert refined[..., 15:].max() < 0.3 * refined[..., :13].mean()


def test_inputs_stay_and_no_gradient_is_kept():
    images, masks = example()
    masks.requires_grad_()
    kept = images.clone(), masks.detach().clone()
    assert not par.refine(images, masks, iterations=0).requires_grad
    assert not par.refine(images, masks).requires_grad
    assert_close((images, masks.detach()), kept, rtol=0, atol=0)


def test_zero_iterations_only_resize():
    images, masks = example()
    resized = torch.nn.functional.interpolate(masks, size=(13, 17), mode="bilinear", align_corners=True)
    assert_close(par.refine(images, masks, iterations=0), resized, rtol=0, atol=0)


def test_computes_in_full_precision_under_autocast():
    images, masks = example(dtype=torch.float32)
    expected = par.refine(images, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = par.refine(images, masks)
    assert refined.dtype == torch.float32
    assert_close(refined, expected, rtol=0, atol=0)
    halves = par.refine(images.bfloat16(), masks.bfloat16())
    assert_close(halves, par.refine(images.bfloat16().float(), masks.bfloat16().float()), rtol=0, atol=0)


def test_wrong_settings_are_named():
    images, masks = example()
    with pytest.raises(ToCoError, match=r"dilations = \(1, 0\)"):
        par.refine(images, masks, dilations=(1, 0))
    with pytest.raises(ToCoError, match=r"dilations = \(\)"):
        par.refine(images, masks, dilations=())
    with pytest.raises(ToCoError, match="iterations = -1"):
        par.refine(images, masks, iterations=-1)
