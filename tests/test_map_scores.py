import math

import cv2
import numpy as np
import pytest

from toco_core.analysis.map_scores import highest, map_scores, outline, outline_f
from toco_core.errors import ToCoError


def random_case(seed, height=13, width=17):
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    mask[2:9, 4:12], mask[3:8, 5:11] = 255, 3
    values = cv2.GaussianBlur(rng.random((height, width)) + 0.3 * (mask == 3), (3, 3), 0)
    return values, mask


def slow_scores(values, mask, reach):
    """By loops; `values` at the mask's size."""
    pixels = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x] != 255]
    truth = {p for p in pixels if mask[p] > 0}
    order = sorted(pixels, key=lambda p: -values[p])
    hits, precision = 0, []
    for n, p in enumerate(order, 1):
        hits += p in truth
        if p in truth:
            precision.append(hits / n)
    found = set(order[: len(truth)])

    def edge(region):
        around = lambda p: [(p[0] + 1, p[1]), (p[0] - 1, p[1]), (p[0], p[1] + 1), (p[0], p[1] - 1)]  # noqa: E731
        inside = lambda p: 0 <= p[0] < mask.shape[0] and 0 <= p[1] < mask.shape[1]  # noqa: E731
        return [p for p in region if any(q not in region for q in around(p) if inside(q))]

    mine, other = edge(found), edge(truth)
    near = lambda p, places: any(math.dist(p, q) <= reach for q in places)  # noqa: E731
    p = sum(near(a, other) for a in mine) / len(mine)
    r = sum(near(a, mine) for a in other) / len(other)
    return (
        sum(precision) / len(truth),
        len(found & truth) / len(found | truth),
        2 * p * r / (p + r) if p + r else 0.0,
        len(truth) / len(pixels),
    )


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_way(seed):
    values, mask = random_case(seed)
    for tolerance in (0.05, 0.09):
        found = map_scores(values, mask, tolerance=tolerance)
        np.testing.assert_allclose(found, slow_scores(values, mask, tolerance * math.hypot(13, 17)), atol=1e-5)


def test_a_perfect_map_a_reversed_one_and_a_constant_one():
    _, mask = random_case(0)
    perfect = map_scores((mask == 3).astype(float), mask)
    assert perfect[:3] == (1.0, 1.0, 1.0)
    backwards = map_scores((mask != 3).astype(float), mask)
    assert backwards.iou == 0 and backwards.average_precision <= perfect.chance
    assert map_scores(np.ones((4, 5)), mask).average_precision == pytest.approx(perfect.chance)


def test_a_coarse_map_is_enlarged_in_place():
    mask = np.zeros((24, 40), np.uint8)
    mask[:12, 24:] = 2
    coarse = np.zeros((3, 5))
    coarse[0, 3:] = 1
    assert map_scores(coarse, mask).iou > 0.6
    assert map_scores(coarse[:, ::-1], mask).iou == 0 and map_scores(coarse[::-1], mask).iou == 0


def test_void_pixels_do_not_count():
    values, mask = random_case(1)
    changed = np.where(mask == 255, 9.0, values)
    assert map_scores(changed, mask)[:2] == map_scores(values, mask)[:2]


def test_the_highest_places():
    values = np.array([[1, 5, 3], [5, 2, 4]])
    seen = np.array([[True, True, True], [True, True, False]])
    np.testing.assert_array_equal(highest(values, 2, seen), [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(highest(values, 3, seen), [[0, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(highest(np.ones((2, 3)), 2, seen), [[1, 1, 0], [0, 0, 0]])


def test_outlines():
    region = np.zeros((5, 7), bool)
    region[:4, 1:6] = True
    wanted = region.copy()
    wanted[:3, 2:5] = False
    np.testing.assert_array_equal(outline(region), wanted)
    everywhere = np.ones((5, 7), bool)
    assert not outline(everywhere).any() and outline_f(everywhere, region, everywhere, reach=9.0) == 0
    moved = np.roll(region, 1, axis=0)
    assert outline_f(region, region, everywhere, reach=0.0) == 1
    assert outline_f(moved, region, everywhere, reach=0.9) < outline_f(moved, region, everywhere, reach=1.0)


@pytest.mark.parametrize("value", [0, 4, 255])
def test_a_mask_that_cannot_judge(value):
    with pytest.raises(ToCoError, match="no object, or nothing but objects"):
        map_scores(np.ones((2, 2)), np.full((6, 5), value, np.uint8))
