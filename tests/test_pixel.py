"""Why a pixel has its label, against a second version that walks from pixel to pixel."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toco_core import par
from toco_core.labels import pseudo_label
from toco_core.predict.pixel import corners, influence, trace_par

H, W, DILATIONS = 7, 9, (1, 3)


def slow_weights(image, y, x):
    """The equation of `par`, one pixel: list of (dy, dx, neighbour's place, weight), written without tensors."""
    places = [(dy * d, dx * d) for d in DILATIONS for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    inside = [(min(max(y + dy, 0), H - 1), min(max(x + dx, 0), W - 1)) for dy, dx in places]
    n = len(places)
    colour = [0.0] * n
    for c in range(3):
        values = [float(image[c, j, i]) for j, i in inside]
        mean = sum(values) / n
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
        for o in range(n):
            colour[o] -= ((values[o] - float(image[c, y, x])) / (0.3 * (deviation + 1e-8))) ** 2 / 3
    lengths = [math.hypot(*place) for place in places]
    mean = sum(lengths) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in lengths) / (n - 1))
    position = [-((v / (0.3 * (deviation + 1e-8))) ** 2) for v in lengths]

    def softmax(values):
        top = max(values)
        powers = [math.exp(v - top) for v in values]
        return [p / sum(powers) for p in powers]

    weights = [a + 0.01 * b for a, b in zip(softmax(colour), softmax(position), strict=True)]
    return [(*place, where, weight) for place, where, weight in zip(places, inside, weights, strict=True)]


def slow_scores(image, first, steps):
    """`first` c h w -> scores after each step, by visiting every pixel and its neighbours; divided by 1.01 per step."""
    history = [first]
    table = {(y, x): slow_weights(image, y, x) for y in range(H) for x in range(W)}
    for _ in range(steps):
        last, now = history[-1], np.zeros_like(first)
        for (y, x), votes in table.items():
            for _, _, (j, i), weight in votes:
                now[:, y, x] += weight / 1.01 * last[:, j, i]
        history.append(now)
    return history


@pytest.fixture
def image():
    torch.manual_seed(3)
    return torch.rand(1, 3, H, W, dtype=torch.float64)


@pytest.mark.parametrize("pixel", [(0, 0), (3, 5), (6, 8), (2, 8)])
def test_trace_is_that_of_the_slow_version(image, pixel):
    """Scores of every class after every step, both thresholds, in a corner, in the middle and at a border."""
    cams = torch.rand(1, 2, H, W, dtype=torch.float64)
    found = trace_par(image, cams, pixel, beta_l=0.3, beta_h=0.6, iterations=4, dilations=DILATIONS, scale=1.0)
    for beta, scores in ((0.6, found.high), (0.3, found.low)):
        e = np.exp(cams[0].numpy())
        first = np.concatenate([math.exp(beta) / (math.exp(beta) + e.sum(0, keepdims=True))] + [
            e[k : k + 1] / (math.exp(beta) + e.sum(0, keepdims=True)) for k in range(2)
        ])  # fmt: skip
        history = slow_scores(image[0].numpy(), first, 4)
        wanted = np.array([scores_[:, pixel[0], pixel[1]] for scores_ in history])
        np.testing.assert_allclose(scores.numpy(), wanted, atol=1e-12)
        np.testing.assert_allclose(scores.sum(1).numpy(), 1)
    assert found.pixel == pixel and found.size == (H, W)


def test_votes_are_those_of_the_slow_version(image):
    for pixel in ((0, 4), (5, 1)):
        found = trace_par(
            image, torch.rand(1, 1, H, W), pixel, beta_l=0.3, beta_h=0.6, dilations=DILATIONS, scale=1.0
        ).votes
        wanted = {(dy, dx): (where, weight / 1.01) for dy, dx, where, weight in slow_weights(image[0].numpy(), *pixel)}
        assert len(found) == len(wanted) == 16
        for vote in found:
            where, weight = wanted[round(vote.dy), round(vote.dx)]
            assert (vote.y, vote.x) == where and vote.weight == pytest.approx(weight, abs=1e-12)
        weights = [vote.weight for vote in found]
        assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(1)


def test_rows_make_what_par_makes(image):
    """Each row times any first scores is what `par.apply` has at the pixel."""
    affinity = par.affinity(image, dilations=DILATIONS)
    masks = torch.rand(1, 3, H, W, dtype=torch.float64)
    for y, x in ((1, 7), (6, 0)):
        start = torch.zeros(H, W, dtype=torch.float64)
        start[y, x] = 1
        rows = influence(affinity, start, 5)
        torch.testing.assert_close(rows.sum((1, 2)), torch.ones(6, dtype=torch.float64))
        for step in range(6):
            wanted = par.apply(affinity, masks, iterations=step)[0, :, y, x] / 1.01**step
            torch.testing.assert_close((rows[step] * masks[0]).sum((1, 2)), wanted)


def test_corners_are_those_of_bilinear_interpolation():
    values = torch.rand(1, 1, 5, 3, dtype=torch.float64)
    large = F.interpolate(values, size=(11, 8), mode="bilinear", align_corners=False)[0, 0]
    for y in range(11):
        for x in range(8):
            weights = corners((y, x), (11, 8), (5, 3))
            assert float((weights * values[0, 0]).sum()) == pytest.approx(float(large[y, x]), abs=1e-12)


def test_the_last_step_is_the_pseudo_label(image):
    """At half the size, every pixel: the label that the trace ends in is the one that is painted."""
    cams = F.interpolate(torch.rand(1, 2, 3, 4, dtype=torch.float64), size=(H, W), mode="bilinear")
    options = {"beta_l": 0.35, "beta_h": 0.62, "iterations": 3, "dilations": DILATIONS, "scale": 0.5}
    label, known, agree = pseudo_label(image, cams, torch.ones(1, 2), **options)[0], {}, 0
    for y in range(H):
        for x in range(W):
            trace = trace_par(image, cams, (y, x), **options, known=known)
            top = trace.high[-1].sort().values
            near = min(float(top[-1] - top[-2]), float(trace.low[-1].sort().values.diff()[-1])) < 1e-6
            assert trace.slot(3) == int(label[y, x]) or near
            agree += not near
    assert agree > 0.9 * H * W and len(np.unique(label)) >= 3
    assert len([key for key in known if len(key) == 2]) == 1 and len([key for key in known if len(key) == 4]) == 1
