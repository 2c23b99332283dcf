"""Kinds of pixel errors: the fast count against a loop over pixels that is written from the table of the module."""

import numpy as np
import pytest

from toco_core.analysis.errors import KINDS, error_kinds, pixel_errors, total_errors
from toco_core.errors import ToCoError


def slow_counts(label, mask):
    """Kind -> wrong pixels, one pixel after the other."""
    H, W = mask.shape
    in_image = {int(mask[y, x]) for y in range(H) for x in range(W)} - {0, 255}
    counts = dict.fromkeys(KINDS, 0)
    for y in range(H):
        for x in range(W):
            t, p = int(mask[y, x]), int(label[y, x])
            if 255 in (t, p) or t == p:
                continue
            if p == 0:
                counts["missed part"] += 1
            elif p not in in_image:
                counts["wrong class"] += 1
            elif t == 0:
                counts["spilled over"] += 1
            else:
                counts["co-occurring class"] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_those_of_the_loop(seed):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 0, 3, 7, 255], np.uint8), (13, 22))
    label = rng.choice(np.array([0, 3, 7, 9, 255], np.uint8), (13, 22))
    expected, found = slow_counts(label, mask), pixel_errors(label, mask)
    assert dict(zip(KINDS, found.counts.tolist(), strict=True)) == expected
    assert min(expected.values()) > 0
    named = mask != 255
    assert found.decided == (named & (label != 255)).sum() and found.undecided == (named & (label == 255)).sum()
    np.testing.assert_allclose(found.shares.sum(), 1)
    wrong = named & (label != 255) & (label != mask)
    assert found.rate == wrong.sum() / found.decided
    np.testing.assert_array_equal(error_kinds(label, mask) > 0, wrong)
    assert found.main == max(KINDS, key=lambda kind: (expected[kind], -KINDS.index(kind)))


def test_each_kind_by_hand():
    mask = np.array([[0, 0, 1, 1, 2, 255]], np.uint8)
    for label, kind in (
        ([[0, 0, 0, 1, 2, 1]], "missed part"),
        ([[1, 0, 1, 1, 2, 0]], "spilled over"),
        ([[0, 0, 1, 2, 2, 0]], "co-occurring class"),
        ([[0, 5, 1, 1, 2, 0]], "wrong class"),
        ([[0, 0, 5, 1, 2, 0]], "wrong class"),
    ):
        found = pixel_errors(np.array(label, np.uint8), mask)
        assert found.main == kind and found.counts.sum() == 1 and found.decided == 5
        assert found.shares[KINDS.index(kind)] == 1


def test_a_class_that_only_void_pixels_would_show_is_not_in_the_image():
    mask, label = np.array([[0, 255, 1]], np.uint8), np.array([[2, 2, 1]], np.uint8)
    assert pixel_errors(label, mask).main == "wrong class"


def test_without_errors_nothing_is_the_main_kind():
    mask = np.array([[0, 1, 255]], np.uint8)
    for label in (mask, np.full_like(mask, 255)):
        found = pixel_errors(label, mask)
        assert found.main is None and found.rate == 0 and not found.shares.any()


def test_a_split_is_the_sum_of_its_images():
    mask = np.array([[0, 1, 1, 2]], np.uint8)
    labels = [np.array([values], np.uint8) for values in ([0, 0, 0, 2], [1, 1, 1, 2], [0, 1, 1, 255])]
    found = total_errors([pixel_errors(label, mask) for label in labels])
    assert found.counts.tolist() == [2, 1, 0, 0] and found.decided == 11 and found.undecided == 1
    np.testing.assert_allclose(found.shares, [2 / 3, 1 / 3, 0, 0])
    assert total_errors([]).main is None


def test_sizes_must_agree():
    with pytest.raises(ToCoError, match="label is 3 x 4, the mask 4 x 3"):
        pixel_errors(np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.uint8))
