"""Refiners: equal bits for PAR, the label of two thresholds without refinement, and a row of one's own."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from toco_core import labels, par
from toco_core.config import LabelConfig, override, tiny
from toco_core.errors import ToCoError
from toco_core.refiners import REFINERS, build_refiner

B, K, H, W = 3, 4, 22, 31
IMAGE_LABELS = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
BETAS = (0.6, 0.3)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(4)
    return F.interpolate(torch.rand(B, 3, 5, 6, generator=generator), size=(H, W), mode="bilinear")


@pytest.fixture(scope="module")
def cam():
    generator = torch.Generator().manual_seed(5)
    return F.interpolate(torch.rand(B, K, 4, 3, generator=generator), size=(H, W), mode="bilinear")


def resized(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("scale", [0.5, 0.71])
def test_par_has_the_bits_of_its_equations(images, cam, scale):
    """One image and one background score after the other, PAR called directly."""
    settings = {"iterations": 3, "dilations": (1, 3), "scale": scale}
    found = labels.refined_labels(images, cam, IMAGE_LABELS, betas=BETAS, refiner="par", **settings)
    small = (math.floor(H * scale), math.floor(W * scale))
    for b, classes in ((0, [1, 3]), (2, [0, 1, 2])):
        affinity = par.affinity(resized(images[b : b + 1], small), dilations=(1, 3))
        strength = resized(cam[b : b + 1, classes], small).exp()
        for t, beta in enumerate(BETAS):
            probabilities = strength / (math.exp(beta) + strength.sum(1, keepdim=True))
            refined = par.apply(affinity, probabilities, iterations=3)
            scores = torch.cat([1.01**3 - refined.sum(1, keepdim=True), refined], dim=1)
            winner = resized(scores, (H, W)).argmax(1)[0]
            assert torch.equal(found[t, b], torch.tensor([0] + [k + 1 for k in classes])[winner])
    assert not found[:, 1].any() and len(found[0, 2].unique()) == 4


def test_no_refinement_is_the_threshold(images, cam):
    found = labels.refined_labels(images, cam.double(), IMAGE_LABELS, betas=BETAS, refiner="none")
    for t, beta in enumerate(BETAS):
        assert torch.equal(found[t], labels.eval_label(cam.double(), IMAGE_LABELS, beta=beta))


@pytest.mark.parametrize("name", list(REFINERS))
def test_scores_begin_with_the_background(images, name):
    """Certain classes stay what they are under every refiner; sets of different background scores are kept apart."""
    certain = torch.zeros(B, 2, H, W)
    certain[:, 1, :, : W // 2] = 0.98
    halves = torch.stack([certain[0, 1] > 0, certain[0, 1] == 0])
    settings = {"masks": [halves] * B} if name == "masks" else {}
    low, high = build_refiner(name, **settings)(images, [certain, 0.5 * certain])
    for scores in (low, high):
        assert scores.shape == (B, 3, H, W)
    assert (low.argmax(1)[:, :, 2 : W // 2 - 8] == 2).all() and not low.argmax(1)[:, :, -3:].any()
    assert not torch.equal(low, high) or name == "masks"  # whose scores are 0 and 1


def test_a_config_chooses_by_name(images, cam):
    config = override(tiny(), refiner="crf").labels
    assert config.refiner_options() == {"refiner": "crf"}
    settings = {"iterations": 7, "dilations": (2, 5), "scale": 0.25}
    config = LabelConfig(par_iterations=7, par_dilations=(2, 5), par_scale=0.25)
    assert config.refiner_options() == {"refiner": "par", **settings}
    assert build_refiner(**{"name" if k == "refiner" else k: v for k, v in config.refiner_options().items()}) == (
        REFINERS["par"](**settings)
    )
    assert override(tiny(), refiner="par").short_hash() == tiny().short_hash()


def test_a_row_of_ones_own_is_all_that_is_needed(images, cam, monkeypatch):
    """A record that turns everything over comes through the config into the pseudo label."""

    @dataclasses.dataclass(frozen=True)
    class Mirror:
        scale: float = 1.0

        def __call__(self, images, classes):
            return [torch.cat([1 - part.sum(1, keepdim=True), part], dim=1).flip(-1) for part in classes]

    monkeypatch.setitem(REFINERS, "mirror", Mirror)
    options = override(tiny(), refiner="mirror").labels.pseudo_label_options()
    found = labels.pseudo_label(images, cam, IMAGE_LABELS, **options)
    plain = labels.pseudo_label(images, cam, IMAGE_LABELS, **options | {"refiner": "none"})
    assert torch.equal(found.flip(-1), plain) and not torch.equal(found, plain)


def test_what_is_refused(images, cam):
    with pytest.raises(ToCoError, match="refiner = 'pra' is not allowed: one of par, crf, masks, none"):
        labels.refined_labels(images, cam, IMAGE_LABELS, betas=BETAS, refiner="pra")
    with pytest.raises(ToCoError, match="scale = 1.5 of crf"):
        labels.refined_labels(images, cam, IMAGE_LABELS, betas=BETAS, refiner="crf", scale=1.5)
    assert_close(build_refiner("par").scale, 0.5)
