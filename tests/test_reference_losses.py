"""Losses, energy and learning rates against the numbers of the published release (see `reference_files`)."""

import math

import pytest
import torch
from reference_files import ATOL, RTOL, reference  # noqa: F401  (a fixture)
from torch.testing import assert_close

from toco_core.config import lr_at, voc
from toco_core.lattice import energy_lattices
from toco_core.losses import ctc_loss, dense_energy_loss, ptc_loss, segmentation_loss

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
GRADIENT_RTOL = 1e-4  # of the largest entry, for gradients that lie far below the absolute tolerance


def same(ours, theirs):
    assert_close(ours.reshape(theirs.shape), theirs, rtol=RTOL, atol=ATOL)


def same_gradient(loss, x, theirs):
    """Within the tolerances of values, and within 1e-4 of the largest entry."""
    (ours,) = torch.autograd.grad(loss, x)
    same(ours, theirs)
    largest = theirs.abs().max().item()
    assert_close(ours, theirs, rtol=RTOL, atol=GRADIENT_RTOL * largest)


def test_ptc(reference):  # noqa: F811
    arrays = reference("ptc.npz")
    tokens = arrays["tokens"].requires_grad_()
    loss = ptc_loss(tokens, arrays["labels"], keep_constant=True)
    same(loss, arrays["loss"])
    same_gradient(loss, tokens, arrays["grad"])


@pytest.mark.parametrize("name", ("ctc", "ctc_no_negative", "ctc_no_positive"))
def test_ctc(reference, name):  # noqa: F811
    arrays = reference(f"{name}.npz")
    student, is_positive = arrays["student"].requires_grad_(), arrays["positive"] == 1
    loss = ctc_loss(student, arrays["teacher"], is_positive, temperature=arrays["temperature"].item())
    same(loss, arrays["loss"])
    if is_positive.all():  # the release loses digits in 1 + 1e-4 here; the gradient is 1e-6
        (ours,) = torch.autograd.grad(loss, student)
        same(ours, arrays["grad"])
    else:
        same_gradient(loss, student, arrays["grad"])


def test_segmentation(reference):  # noqa: F811
    arrays = reference("seg_energy.npz")
    logits, label = arrays["logits"].requires_grad_(), arrays["labels"]
    loss = segmentation_loss(logits, label, nan_when_empty=True)
    assert_close(loss, arrays["seg_loss"].reshape(()), rtol=RTOL, atol=ATOL, equal_nan=True)
    if loss.isfinite():
        same_gradient(loss, logits, arrays["seg_grad"])


@pytest.mark.parametrize("lattices_before", (True, False))
def test_energy(reference, lattices_before):  # noqa: F811
    arrays = reference("seg_energy.npz")
    logits = arrays["logits"].requires_grad_()
    images = arrays["images_normalised"] * STD + MEAN
    lattices = energy_lattices(images) if lattices_before else None
    loss = dense_energy_loss(logits, images, arrays["labels"], arrays["boxes"], lattices=lattices)
    assert_close(loss.reshape(1), arrays["energy_loss"].reshape(1), rtol=RTOL, atol=0)
    same_gradient(loss, logits, arrays["energy_grad"])


def test_learning_rates(reference):  # noqa: F811
    """The published schedule of VOC; the columns are the two groups, encoder and heads."""
    arrays, recipe = reference("lr_schedule.npz"), voc().schedule
    shape = {name: getattr(recipe, name) for name in ("steps", "warmup_steps", "warmup_ratio", "power")}
    for step, rates in zip(arrays["step"].tolist(), arrays["lr"].tolist(), strict=True):
        for base_lr, rate in zip((recipe.lr, recipe.lr * recipe.head_lr_scale), rates, strict=True):
            assert math.isclose(lr_at(step, base_lr=base_lr, **shape), rate, rel_tol=1e-12), step
