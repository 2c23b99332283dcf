"""Slow image operations written from their definitions: one pixel at a time, float arithmetic, no OpenCV."""

import colorsys
import math

import numpy as np


def each_pixel(image, function):
    """A uint8 image whose pixel (y, x) is `function(r, g, b)`, rounded and clipped to 0..255."""
    out = np.empty(image.shape, dtype=np.uint8)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            values = function(*(float(v) for v in image[y, x]))
            out[y, x] = [min(255, max(0, round(v))) for v in values]
    return out


def grey_of(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


def brightness(image, factor):
    return each_pixel(image, lambda r, g, b: (r * factor, g * factor, b * factor))


def contrast(image, factor):
    greys = [grey_of(*(float(v) for v in pixel)) for row in image for pixel in row]
    mean = sum(greys) / len(greys)
    return each_pixel(image, lambda *rgb: [mean + factor * (v - mean) for v in rgb])


def saturation(image, factor):
    return each_pixel(image, lambda *rgb: [grey_of(*rgb) + factor * (v - grey_of(*rgb)) for v in rgb])


def hue(image, turn):
    def turned(r, g, b):
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        return [255 * c for c in colorsys.hsv_to_rgb((h + turn) % 1, s, v)]

    return each_pixel(image, turned)


def solarise(image):
    return each_pixel(image, lambda *rgb: [v if v < 128 else 255 - v for v in rgb])


def mirrored(i, n):
    """Index i of an axis of length n continued by mirroring at its first and last element (... 2 1 | 0 1 2 ...)."""
    if n == 1:
        return 0
    i = abs(i) % (2 * (n - 1))
    return i if i < n else 2 * (n - 1) - i


def blur(image, sigma):
    """Direct convolution with a Gaussian cut at 3 sigma, normalised to 1."""
    reach = math.ceil(3 * sigma)
    weight = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
    total = sum(weight) ** 2
    H, W, _ = image.shape
    out = np.zeros(image.shape)
    for y in range(H):
        for x in range(W):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    pixel = image[mirrored(y + dy, H), mirrored(x + dx, W)]
                    out[y, x] += weight[dy + reach] * weight[dx + reach] / total * pixel
    return np.rint(out).clip(0, 255).astype(np.uint8)
