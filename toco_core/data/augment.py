"""From one image to what one training step needs of it: three differently varied views.

Everything is `uint8` RGB `H W 3` (or `3 H W` in the result), as in the release's own pipeline; normalising on the
training device makes floats of it. Every random number comes from the `rng` that is passed in. OpenCV does the work.

The primitives (`brightness` ... `solarise`) follow the definitions of the usual colour jitter: brightness and contrast
blend with black and with the mean grey, saturation blends with the grey image, hue turns the HSV circle.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int64, UInt8

from toco_core.errors import ToCoError

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of R, G, B (ITU-R 601)
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1  # strengths of the jitter, as in DINO and the release
SOLARISE_FROM = 128


class ColourChance(NamedTuple):
    """Probabilities of the colour variations of one view; `blur` draws its sigma from `blur_sigma`."""

    jitter: float
    grey: float
    blur: float
    solarise: float


# As in the release. The main image is blurred every time.
IMAGE_COLOUR = ColourChance(jitter=0.8, grey=0.2, blur=1.0, solarise=0.0)
GLOBAL_COLOUR = ColourChance(jitter=0.8, grey=0.2, blur=0.1, solarise=0.2)
LOCAL_COLOUR = ColourChance(jitter=0.8, grey=0.2, blur=0.5, solarise=0.0)


class Views(NamedTuple):
    """What training sees of one image. Outside `valid_box` `image` and `local_image` are exactly `pad_colour`."""

    image: UInt8[np.ndarray, "3 H W"]
    global_view: UInt8[np.ndarray, "3 H W"]
    local_image: UInt8[np.ndarray, "3 H W"]
    valid_box: Int64[np.ndarray, "4"]  # top, bottom, left, right: image[:, top:bottom, left:right] is not padding


def training_views(
    image: UInt8[np.ndarray, "h w 3"],
    *,
    crop_size: int | tuple[int, int],
    rng: np.random.Generator,
    scale_range: tuple[float, float] = (0.5, 2.0),
    scale_relative: bool = False,
    global_area: tuple[float, float] = (0.4, 1.0),
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    image_colour: ColourChance = IMAGE_COLOUR,
    global_colour: ColourChance = GLOBAL_COLOUR,
    local_colour: ColourChance = LOCAL_COLOUR,
    pad_colour: tuple[int, int, int] = (0, 0, 0),
    independent_local_image: bool = False,
    mirrored_valid_box: bool = False,
) -> Views:
    """The main image (also the first global view), the second global view, and the image that local views are cut from.

    image: rescaled by a factor from `scale_range`, flipped half of the time, cropped to `crop_size` (H = W, or a pair)
        at a random place, padded with `pad_colour` at a random offset where it is smaller; coloured by `image_colour`.
        With `scale_relative` the factor 1 is the size at which the image has the area of a crop, not its own size.
    local_image: the same crop with its own colours, so that a place in it is the same place in `image` and its region
        map.
    global_view: another window of the original, with a share of its area from `global_area` and an aspect of 3:4 to
        4:3, stretched to `crop_size`, flipped half of the time.

    Deviations from the release, all on purpose. (1) There `image` is flipped a second time after its box was taken, and
    `local_image` on its own: `mirrored_valid_box` and `independent_local_image` do so (the first alone flips both). (2)
    There colours vary after padding, so that jitter changes the padding and blur smears it in; here padding comes last.
    (3) The crop is taken in the source and resized once, which moves its border by less than a source pixel; smaller
    scales average areas. (4) A global window too wide or high for the image is cut to it instead of drawn again.

    Raises ToCoError for sizes or ranges that cannot be drawn from.
    """
    size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    _check_ranges(image, size, scale_range=scale_range, global_area=global_area, blur_sigma=blur_sigma)

    if scale_relative:
        scale_range = scaled_range(scale_range, image.shape[:2], size)
    crop, valid_box = _random_crop(image, size, scale_range, rng)
    flip_image = mirrored_valid_box and rng.random() < 0.5
    flip_local = rng.random() < 0.5 if independent_local_image else flip_image
    views = []
    for colour, flip in ((image_colour, flip_image), (local_colour, flip_local)):
        view = _pad(vary_colour(crop, colour, blur_sigma, rng), size, valid_box, pad_colour)
        views.append(cv2.flip(view, 1) if flip else view)
    global_view = vary_colour(_random_window(image, size, global_area, rng), global_colour, blur_sigma, rng)
    main, local_image, global_view = (np.ascontiguousarray(view.transpose(2, 0, 1)) for view in (*views, global_view))
    return Views(main, global_view, local_image, np.array(valid_box, dtype=np.int64))


def scaled_range(
    scale_range: tuple[float, float], image_size: tuple[int, int], crop_size: tuple[int, int]
) -> tuple[float, float]:
    """Turn factors that count from the size at which an image has the area of a crop into factors of its own size."""
    unit = math.sqrt(math.prod(crop_size) / math.prod(image_size))
    return unit * scale_range[0], unit * scale_range[1]


def vary_colour(
    image: UInt8[np.ndarray, "H W 3"],
    chance: ColourChance,
    blur_sigma: tuple[float, float],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "H W 3"]:
    """Jitter (brightness, contrast, saturation, hue in random order), then grey, blur, solarise, each by chance."""
    if rng.random() < chance.jitter:
        for step in rng.permutation(4):
            if step == 0:
                image = brightness(image, rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
            elif step == 1:
                image = contrast(image, rng.uniform(1 - CONTRAST, 1 + CONTRAST))
            elif step == 2:
                image = saturation(image, rng.uniform(1 - SATURATION, 1 + SATURATION))
            else:
                image = hue(image, rng.uniform(-HUE, HUE))
    if rng.random() < chance.grey:
        image = saturation(image, 0.0)
    if rng.random() < chance.blur:
        image = blur(image, rng.uniform(*blur_sigma))
    if rng.random() < chance.solarise:
        image = solarise(image)
    return image


def brightness(image: UInt8[np.ndarray, "H W 3"], factor: float) -> UInt8[np.ndarray, "H W 3"]:
    """`factor` * image, clipped to 0..255. Factor 0 is black, 1 changes nothing."""
    return _through_table(image, _LEVELS * factor)


def contrast(image: UInt8[np.ndarray, "H W 3"], factor: float) -> UInt8[np.ndarray, "H W 3"]:
    """Blend with the mean of the grey image: `factor` 0 is that grey, 1 changes nothing, above 1 goes beyond."""
    grey = float(np.dot(cv2.mean(image)[:3], GREY_WEIGHTS))
    return _through_table(image, _LEVELS * factor + grey * (1 - factor))


def saturation(image: UInt8[np.ndarray, "H W 3"], factor: float) -> UInt8[np.ndarray, "H W 3"]:
    """Blend every pixel with its grey value: `factor` 0 is a grey image, 1 changes nothing."""
    to_grey = np.tile(np.array(GREY_WEIGHTS), (3, 1))
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * to_grey)


def hue(image: UInt8[np.ndarray, "H W 3"], turn: float) -> UInt8[np.ndarray, "H W 3"]:
    """Turn the hue by this share of the full circle, in steps of 1/256. Grey stays grey."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    steps = np.uint8(round(turn * 256) % 256)
    np.add(hsv[..., 0], steps, out=hsv[..., 0])  # uint8 wraps around, as the circle does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def blur(image: UInt8[np.ndarray, "H W 3"], sigma: float) -> UInt8[np.ndarray, "H W 3"]:
    """Gaussian blur with standard deviation `sigma` in pixels, cut at 3 sigma, mirrored at the border."""
    width = 2 * int(np.ceil(3 * sigma)) + 1
    return cv2.GaussianBlur(image, (width, width), sigma, borderType=cv2.BORDER_REFLECT_101)


def solarise(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Invert the values from 128 up."""
    return _through_table(image, np.where(_LEVELS < SOLARISE_FROM, _LEVELS, 255 - _LEVELS))


def resize(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int, *, enlarge: int = cv2.INTER_LINEAR
) -> UInt8[np.ndarray, "height width 3"]:
    """Stretch to `height` x `width`: mean over areas where that shrinks the image, `enlarge` (bilinear) otherwise."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else enlarge)


_LEVELS = np.arange(256, dtype=np.float64)


def _through_table(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _check_ranges(image: np.ndarray, size: tuple[int, int], **ranges: tuple[float, float]) -> None:
    if min(size) < 1:
        raise ToCoError(f"crop_size = {size} must be at least 1 pixel")
    if min(image.shape) < 1:
        raise ToCoError(f"image of shape {image.shape} has no pixels")
    for name, (low, high) in ranges.items():
        if not 0 < low <= high or (name == "global_area" and high > 1):
            raise ToCoError(f"{name} = ({low}, {high}) must be 0 < low <= high{' <= 1' * (name == 'global_area')}")


def _random_crop(
    image: np.ndarray, size: tuple[int, int], scale_range: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Scale, flip, crop: the piece of image, and the box (top, bottom, left, right) where it lies in the crop."""
    scale = rng.uniform(*scale_range)
    flip = rng.random() < 0.5
    window, box = [], []
    for length, target in zip(image.shape[:2], size, strict=True):
        scaled = max(1, round(length * scale))
        if scaled >= target:  # the whole crop is image: a window of the source
            wide = min(length, max(1, round(target / scale)))
            start = int(rng.integers(length - wide + 1))
            window.append(slice(start, start + wide))
            box += [0, target]
        else:  # the whole source fits: it lies somewhere in the padding
            offset = int(rng.integers(target - scaled + 1))
            window.append(slice(0, length))
            box += [offset, offset + scaled]
    top, bottom, left, right = box
    crop = resize(image[tuple(window)], bottom - top, right - left)
    return cv2.flip(crop, 1) if flip else crop, (top, bottom, left, right)


def _pad(
    crop: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int], colour: tuple[int, int, int]
) -> np.ndarray:
    top, bottom, left, right = box
    height, width = size
    margins = (top, height - bottom, left, width - right)
    return cv2.copyMakeBorder(crop, *margins, borderType=cv2.BORDER_CONSTANT, value=colour)


def _random_window(
    image: np.ndarray, size: tuple[int, int], area: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A window of random area and aspect, stretched to `size` and flipped half of the time."""
    height, width = image.shape[:2]
    pixels = height * width * rng.uniform(*area)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    high = min(height, max(1, round(np.sqrt(pixels / aspect))))
    wide = min(width, max(1, round(np.sqrt(pixels * aspect))))
    top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
    window = resize(image[top : top + high, left : left + wide], *size, enlarge=cv2.INTER_CUBIC)
    return cv2.flip(window, 1) if rng.random() < 0.5 else window
