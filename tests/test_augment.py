import cv2
import numpy as np
import pytest
import reference_augment as slow

from toco_core.data import augment
from toco_core.data.augment import ColourChance, training_views, vary_colour
from toco_core.errors import ToCoError

PLAIN = ColourChance(0.0, 0.0, 0.0, 0.0)
PLAIN_COLOURS = {"image_colour": PLAIN, "global_colour": PLAIN, "local_colour": PLAIN}


@pytest.fixture
def photo():
    """Smooth and colourful, 37 x 53."""
    return smooth_image(37, 53, seed=0)


def smooth_image(height, width, seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def assert_near(ours, theirs, levels, share=1.0):
    """At most `levels` grey levels apart, in `share` of the values (and never wildly: 3 times that)."""
    apart = np.abs(ours.astype(int) - theirs.astype(int))
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    assert (apart <= levels).mean() >= share and apart.max() <= 3 * levels, (apart.mean(), apart.max())


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends_equal_their_definition(photo, name, factor):
    assert_near(getattr(augment, name)(photo, factor), getattr(slow, name)(photo, factor), levels=1)


@pytest.mark.parametrize("turn", [-0.1, 0.0, 0.07, 0.5])
def test_hue_turns_the_circle(photo, turn):
    steps = round(turn * 256) / 256
    assert_near(augment.hue(photo, turn), slow.hue(photo, steps), levels=6, share=0.97)  # hue and saturation in 8 bits


def test_hue_leaves_grey_alone_and_turns_red_to_green():
    grey = np.full((3, 5, 3), 90, dtype=np.uint8)
    np.testing.assert_array_equal(augment.hue(grey, 0.3), grey)
    red = np.zeros((2, 3, 3), dtype=np.uint8)
    red[..., 0] = 200
    assert_near(augment.hue(red, 1 / 3), red[..., [1, 0, 2]], levels=3)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_convolution(sigma):
    image = smooth_image(11, 17, seed=1)
    image[4, 9] = (255, 0, 128)
    assert_near(augment.blur(image, sigma), slow.blur(image, sigma), levels=1)


def test_solarise(photo):
    np.testing.assert_array_equal(augment.solarise(photo), slow.solarise(photo))


def test_saturation_zero_is_grey(photo):
    grey = augment.saturation(photo, 0.0)
    assert (grey == grey[..., :1]).all()


def test_colours_that_never_happen_change_nothing(photo):
    np.testing.assert_array_equal(vary_colour(photo, PLAIN, (0.1, 2.0), np.random.default_rng(0)), photo)


def test_resize_means_areas_when_it_shrinks():
    image = smooth_image(12, 20, seed=2)
    means = image.reshape(6, 2, 10, 2, 3).mean(axis=(1, 3))
    assert_near(augment.resize(image, 6, 10), np.rint(means).astype(np.uint8), levels=1)


@pytest.mark.parametrize("crop_size", [24, (24, 40)])
@pytest.mark.parametrize("height, width", [(37, 53), (9, 90), (90, 9), (1, 1)])
def test_views_have_the_crop_size_and_padding_is_exact(crop_size, height, width):
    image = np.maximum(smooth_image(height, width, seed=3), 1)
    H, W = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    for seed in range(20):
        views = training_views(image, crop_size=crop_size, rng=np.random.default_rng(seed), pad_colour=(7, 8, 9))
        assert views.image.shape == views.global_view.shape == views.local_image.shape == (3, H, W)
        top, bottom, left, right = views.valid_box
        assert 0 <= top < bottom <= H and 0 <= left < right <= W
        outside = np.ones((H, W), dtype=bool)
        outside[top:bottom, left:right] = False
        for view in (views.image, views.local_image):
            assert (view[:, outside] == np.array([[7], [8], [9]])).all()


def test_the_source_is_not_written_to(photo):
    before = photo.copy()
    for seed in range(10):
        training_views(photo, crop_size=53, rng=np.random.default_rng(seed))
    np.testing.assert_array_equal(photo, before)


def test_without_scaling_the_box_holds_the_image_or_its_mirror(photo):
    seen = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        views = training_views(photo, crop_size=(60, 70), rng=rng, scale_range=(1.0, 1.0), **PLAIN_COLOURS)
        top, bottom, left, right = views.valid_box
        inside = views.image[:, top:bottom, left:right].transpose(1, 2, 0)
        flipped = not np.array_equal(inside, photo)
        np.testing.assert_array_equal(inside[:, ::-1] if flipped else inside, photo)
        seen.add((flipped, bool(top > 11), bool(left > 8)))
    assert len(seen) == 8  # both mirrors, and offsets on both sides


def test_without_scaling_a_smaller_crop_is_a_window_of_the_image(photo):
    starts = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        views = training_views(photo, crop_size=(31, 47), rng=rng, scale_range=(1.0, 1.0), **PLAIN_COLOURS)
        assert views.valid_box.tolist() == [0, 31, 0, 47]
        crop = views.image.transpose(1, 2, 0)
        places = [
            (y, x, mirror)
            for mirror in (1, -1)
            for y in range(7)
            for x in range(7)
            if np.array_equal(photo[y : y + 31, x : x + 47][:, ::mirror], crop)
        ]
        assert len(places) == 1
        starts.update(places)
    assert {y for y, _, _ in starts} == {x for _, x, _ in starts} == set(range(7))


def test_scale_stays_in_its_range():
    image = smooth_image(40, 60, seed=4)
    heights = []
    for seed in range(200):
        views = training_views(image, crop_size=200, rng=np.random.default_rng(seed), scale_range=(0.5, 2.0))
        top, bottom, left, right = views.valid_box.tolist()
        heights.append(bottom - top)
        assert abs((right - left) / (bottom - top) - 1.5) < 0.06
    assert min(heights) >= 20 and max(heights) <= 80
    assert min(heights) < 25 and max(heights) > 75


@pytest.mark.parametrize("height, width", [(40, 60), (400, 600), (90, 30)])
def test_a_relative_scale_shows_as_much_of_an_image_of_any_size(height, width):
    """At factor f the image covers f * f crops."""
    image = smooth_image(height, width, seed=4)
    options = {"crop_size": (90, 110), "scale_range": (0.5, 0.5), "scale_relative": True}
    top, bottom, left, right = training_views(image, rng=np.random.default_rng(0), **options).valid_box.tolist()
    assert abs((bottom - top) * (right - left) / (90 * 110) - 0.25) < 0.01
    assert abs((right - left) / (bottom - top) - width / height) < 0.05 * width / height


def test_local_image_shows_the_same_place_as_the_image(photo):
    for seed in range(20):
        views = training_views(photo, crop_size=(30, 44), rng=np.random.default_rng(seed), **PLAIN_COLOURS)
        np.testing.assert_array_equal(views.local_image, views.image)


def test_local_image_has_colours_of_its_own(photo):
    views = training_views(photo, crop_size=30, rng=np.random.default_rng(0))
    assert (views.local_image != views.image).any()


def test_independent_local_image_is_mirrored_half_of_the_time(photo):
    same = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        views = training_views(photo, crop_size=33, rng=rng, independent_local_image=True, **PLAIN_COLOURS)
        if np.array_equal(views.local_image, views.image):
            same += 1
        else:
            np.testing.assert_array_equal(views.local_image, views.image[..., ::-1])
    assert 15 <= same <= 45


def test_mirrored_valid_box_is_wrong_half_of_the_time():
    image = np.full((20, 20, 3), 200, dtype=np.uint8)
    right_boxes = 0
    for seed in range(60):
        views = training_views(
            image,
            crop_size=64,
            rng=np.random.default_rng(seed),
            scale_range=(1.0, 1.0),
            mirrored_valid_box=True,
            **PLAIN_COLOURS,
        )
        top, bottom, left, right = views.valid_box
        right_boxes += bool((views.image[:, top:bottom, left:right] == 200).all())
    assert 15 <= right_boxes <= 45


def test_global_view_is_a_window_of_the_whole_image():
    ramp = np.zeros((60, 80, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(80)[None] * 3  # red tells the column, green the row
    ramp[..., 1] = np.arange(60)[:, None] * 4
    areas = []
    for seed in range(100):
        view = training_views(ramp, crop_size=50, rng=np.random.default_rng(seed), **PLAIN_COLOURS).global_view
        red, green = view[0].astype(int), view[1].astype(int)
        columns, rows = np.ptp(red) / 3 + 1, np.ptp(green) / 4 + 1
        areas.append(columns * rows / (60 * 80))
    assert 0.35 < min(areas) < 0.5 and 0.85 < max(areas) <= 1.01


def test_the_generator_alone_decides(photo):
    one, again, other = (training_views(photo, crop_size=32, rng=np.random.default_rng(s)) for s in (5, 5, 6))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.image != other.image).any()


def test_chances_are_met(photo):
    chance = ColourChance(jitter=0.0, grey=0.3, blur=0.0, solarise=0.0)
    greys = 0
    for seed in range(300):
        out = vary_colour(photo, chance, (0.1, 2.0), np.random.default_rng(seed))
        greys += bool((out == out[..., :1]).all())
    assert 60 < greys < 120


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop_size": 0}, r"crop_size = \(0, 0\) must be at least 1"),
        ({"scale_range": (2.0, 0.5)}, r"scale_range = \(2.0, 0.5\) must be 0 < low <= high"),
        ({"scale_range": (0.0, 1.0)}, "scale_range"),
        ({"global_area": (0.4, 1.5)}, "global_area .* <= 1"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
    ],
)
def test_impossible_ranges_are_refused(photo, options, message):
    with pytest.raises(ToCoError, match=message):
        training_views(photo, rng=np.random.default_rng(0), **{"crop_size": 32, **options})
