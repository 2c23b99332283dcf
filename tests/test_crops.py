"""Crops against loops, and where they may be cut."""

import pytest
import reference_labels as slow
import torch
from torch.testing import assert_close

from toco_core import crops
from toco_core.errors import ToCoError


def regions(batch=3, size=(31, 46), seed=0):
    return torch.randint(0, 3, (batch, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def centres(boxes, size):
    return torch.stack([boxes.top + size // 2, boxes.left + size // 2], dim=-1)


@pytest.mark.parametrize("size", [1, 8, 9, 31])
def test_crops_lie_inside_on_background_or_uncertain_places_and_differ(size):
    region = regions()
    boxes = crops.sample_crops(region, n_crops=6, crop_size=size, generator=seeded())
    assert boxes.top.shape == boxes.left.shape == (3, 6)
    assert boxes.top.min() >= 0 and (boxes.top + size).max() <= 31
    assert boxes.left.min() >= 0 and (boxes.left + size).max() <= 46
    for b, places in enumerate(centres(boxes, size).tolist()):
        assert all(region[b, y, x] <= 1 for y, x in places)
        assert len({tuple(place) for place in places}) == 6


def test_every_allowed_place_has_the_same_chance():
    region = torch.full((1, 6, 9), 2)
    allowed = [(1, 1), (1, 5), (2, 7), (4, 3), (4, 4)]
    for y, x in allowed:
        region[0, y, x] = y % 2
    n = 4000
    boxes = crops.sample_crops(region.expand(n, 6, 9), n_crops=3, crop_size=2, generator=seeded())
    places = centres(boxes, 2).flatten(0, 1).tolist()
    shares = [places.count([y, x]) / n for y, x in allowed]
    assert_close(torch.tensor(shares), torch.full((5,), 3 / 5), rtol=0, atol=0.04)
    first = centres(boxes, 2)[:, 0].tolist()  # also the first draw, and the last
    assert_close(
        torch.tensor([first.count([y, x]) / n for y, x in allowed]), torch.full((5,), 1 / 5), rtol=0, atol=0.03
    )
    last = centres(boxes, 2)[:, 2].tolist()
    assert_close(torch.tensor([last.count([y, x]) / n for y, x in allowed]), torch.full((5,), 1 / 5), rtol=0, atol=0.03)


def test_exactly_as_many_places_as_crops_are_all_used():
    region = torch.full((1, 8, 10), 2)
    wanted = {(2, 3), (4, 7), (5, 5)}
    for y, x in wanted:
        region[0, y, x] = 0
    boxes = crops.sample_crops(region, n_crops=3, crop_size=4, generator=seeded())
    assert {tuple(place) for place in centres(boxes, 4)[0].tolist()} == wanted


def test_too_few_places_allow_any():
    region = torch.full((1, 8, 10), 2)
    region[0, 4, 4] = 0
    drawn = crops.sample_crops(region.expand(500, 8, 10), n_crops=2, crop_size=4, generator=seeded())
    assert {tuple(p) for p in centres(drawn, 4).flatten(0, 1).tolist()} == {
        (y, x) for y in range(2, 7) for x in range(2, 9)
    }
    whole = crops.sample_crops(torch.full((2, 6, 6), 2), n_crops=3, crop_size=6)  # one place for three crops
    assert whole.top.eq(0).all() and whole.left.eq(0).all()


def test_padding_is_excluded_unless_told_not_to():
    region = torch.zeros(300, 20, 30, dtype=torch.int8)
    box = torch.tensor([[12, 20, 0, 14]]).expand(300, 4)
    settings = {"n_crops": 4, "crop_size": 6, "valid_box": box}
    places = centres(crops.sample_crops(region, generator=seeded(), **settings), 6)
    assert places[..., 0].min() == 12 and places[..., 1].max() == 13
    released = centres(crops.sample_crops(region, generator=seeded(), crops_in_padding=True, **settings), 6)
    assert released[..., 0].min() == 3 and released[..., 1].max() == 27
    full = torch.full_like(region, 2)  # nothing to centre on: anywhere, but not in the padding
    places = centres(crops.sample_crops(full, generator=seeded(), **settings), 6)
    assert places[..., 0].min() == 12 and places[..., 1].max() == 13
    corner = torch.tensor([[0, 2, 0, 2]]).expand(300, 4)  # no crop fits around a place in the box
    crops.sample_crops(region, n_crops=4, crop_size=6, valid_box=corner)


def test_the_seed_decides():
    region = regions()
    first, again, other = (
        crops.sample_crops(region, n_crops=5, crop_size=8, generator=seeded(seed)) for seed in (3, 3, 4)
    )
    assert_close(first, again)
    assert not torch.equal(first.top, other.top)


@pytest.mark.parametrize("size", [1, 5, 8, 31])
def test_flags_and_ratios_equal_loops(size):
    region = regions()
    region[0, :, :24] = 0
    boxes = crops.sample_crops(region, n_crops=7, crop_size=size, generator=seeded(), crops_in_padding=True)
    for double in (True, False):
        counted = region if double else region.clamp(max=1)
        expected = torch.tensor(
            [
                [slow.ratio_of_crop(counted[b], y, x, size) for y, x in zip(ys, xs, strict=True)]
                for b, (ys, xs) in enumerate(zip(boxes.top.tolist(), boxes.left.tolist(), strict=True))
            ]
        )
        ratio = crops.foreground_ratio(region, *boxes, size, foreground_counts_double=double)
        assert_close(ratio, expected)
        flags = crops.crop_flags(region, *boxes, size, threshold=0.6, foreground_counts_double=double)
        assert_close(flags, expected > 0.6)


def test_a_crop_at_the_threshold_is_negative():
    region = torch.zeros(1, 10, 10, dtype=torch.int16)
    region[0, :2] = 1
    corner = torch.zeros(1, 1, dtype=torch.long)
    assert not crops.crop_flags(region, corner, corner, 10, threshold=0.2).item()
    region[0, 9, 9] = 1
    assert crops.crop_flags(region, corner, corner, 10, threshold=0.2).item()


def test_crops_are_cut_pixel_for_pixel():
    images = torch.rand(3, 3, 31, 46, generator=seeded(), dtype=torch.float64)
    for size in (1, 9, 31):
        boxes = crops.sample_crops(regions(), n_crops=5, crop_size=size, generator=seeded())
        ours = crops.cut_crops(images, *boxes, size)
        assert_close(ours, slow.cut_crops(images, *boxes, size), rtol=0, atol=0)
        assert ours.is_contiguous()


def test_no_crops_are_allowed():
    boxes = crops.sample_crops(regions(), n_crops=0, crop_size=8)
    assert boxes.top.shape == (3, 0)
    assert crops.crop_flags(regions(), *boxes, 8).shape == (3, 0)
    assert crops.cut_crops(torch.rand(3, 3, 31, 46), *boxes, 8).shape == (3, 0, 3, 8, 8)


def test_wrong_sizes_and_corners_are_named():
    region, images = regions(), torch.rand(3, 3, 31, 46)
    for size in (0, 32):
        with pytest.raises(ToCoError, match=f"crop_size = {size}"):
            crops.sample_crops(region, n_crops=2, crop_size=size)
    with pytest.raises(ToCoError, match="n_crops = -1"):
        crops.sample_crops(region, n_crops=-1, crop_size=4)
    top, left = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)
    top[1, 1] = 24
    with pytest.raises(ToCoError, match="top corners 0 to 24 of 8 pixel crops: 0 to 23"):
        crops.cut_crops(images, top, left, 8)
    left[2, 0] = -1
    with pytest.raises(ToCoError, match="left corners -1 to 0"):
        crops.crop_flags(region, top * 0, left, 8)
