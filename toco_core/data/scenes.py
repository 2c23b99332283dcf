"""The embedded data set: a paper zoo, drawn by this module, deterministic from a seed.

All species share bodies, legs, tails and coats; **only the head tells the species for certain**. Each species has a
usual coat, which most wear and which other species and some stones wear too: a hint, no proof. A classifier may
therefore look at a few patches (an antler, a trunk, a mane) while the mask is the whole animal: the situation in
which class activation maps fall short and for which token contrast was made. Backgrounds are textured and cluttered,
animals hide each other, and masks have a rim of 255 (void) as PASCAL VOC's do.

    root = scenes_folder()                  # written once, in VOC layout, to a cache folder
    scene = draw_scene(np.random.default_rng(1))
"""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from toco_core.conventions import voc_palette
from toco_core.errors import ToCoError
from toco_core.machine.locks import alone
from toco_core.machine.writing import remove_parts, whole_folder

VERSION = 2
"""Raised whenever the drawing changes, so that a cached folder of an older drawing is not taken for this one."""

CLASS_NAMES = ("background", "cat", "deer", "duck", "elephant", "giraffe", "lion", "rabbit", "ram")
COATS = ("plain", "stripes", "spots", "checks", "rings", "mottled")
USUAL_COAT = {
    "cat": "stripes",
    "deer": "spots",
    "duck": "plain",
    "elephant": "mottled",
    "giraffe": "checks",
    "lion": "plain",
    "rabbit": "rings",
    "ram": "mottled",
}
VOID = 255
SUPERSAMPLE = 2

Points = np.ndarray
"""A closed polygon, shape (n, 2), x to the right and y down."""


class Scene(NamedTuple):
    """One picture: `image` uint8 H W 3 (RGB), `mask` uint8 H W with 0..8 and 255 = void, `coats` of the animals."""

    image: np.ndarray
    mask: np.ndarray
    coats: tuple[int, ...]


# ---- textures


def _noise(rng: np.random.Generator, h: int, w: int, cells: float, octaves: int = 1) -> np.ndarray:
    """Smooth noise in [0, 1], about `cells` cells along the longer side; each octave halves cell and amplitude."""
    total, amplitude = np.zeros((h, w), np.float32), 1.0
    for _ in range(octaves):
        gh, gw = max(2, round(cells * h / max(h, w)) + 1), max(2, round(cells * w / max(h, w)) + 1)
        total += amplitude * cv2.resize(rng.random((gh, gw), np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
        cells, amplitude = cells * 2, amplitude / 2
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def _coat_field(kind: str, rng: np.random.Generator, h: int, w: int, unit: float) -> np.ndarray:
    """How much of the second coat colour stands at each pixel, in [0, 1]. `unit` is half the body length in pixels."""
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    period = unit * rng.uniform(0.35, 0.6)
    warp = (_noise(rng, h, w, 4) - 0.5) * period * 1.2
    u = np.cos(angle) * x + np.sin(angle) * y + warp
    v = -np.sin(angle) * x + np.cos(angle) * y + warp
    if kind == "plain":
        return 0.25 * _noise(rng, h, w, 3)
    if kind == "stripes":
        return (np.sin(2 * np.pi * u / period) > 0.1).astype(np.float32)
    if kind == "spots":
        return (np.cos(2 * np.pi * u / period) + np.cos(2 * np.pi * v / period) > 0.75).astype(np.float32)
    if kind == "checks":
        return (np.sin(2 * np.pi * u / period / 1.3) * np.sin(2 * np.pi * v / period / 1.3) > 0).astype(np.float32)
    if kind == "rings":
        cy, cx = h * rng.uniform(0.2, 0.8), w * rng.uniform(0.2, 0.8)
        return (np.sin(2 * np.pi * np.hypot(y - cy, x - cx) / period) > 0).astype(np.float32)
    return (_noise(rng, h, w, 2.2 * max(h, w) / unit, octaves=3) > 0.5).astype(np.float32)


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """A random colour, float32 RGB in [0, 255]."""
    hsv = np.array([[[rng.uniform(0, 180), 255 * rng.uniform(*saturation), 255 * rng.uniform(*value)]]]).astype(
        np.uint8
    )
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _coat_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of a coat that can be told apart."""
    bright = _colour(rng, (0.1, 0.65), (0.7, 1.0))
    return bright, bright * rng.uniform(0.3, 0.6) + _colour(rng, (0.3, 0.9), (0.1, 0.35))


# ---- shapes: all in units of half a body length, the head to the right


def _ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, n: int = 28) -> Points:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    x, y = rx * np.cos(t), ry * np.sin(t)
    return np.stack([cx + x * np.cos(angle) - y * np.sin(angle), cy + x * np.sin(angle) + y * np.cos(angle)], 1)


def _stroke(path: list[tuple[float, float]] | np.ndarray, width_from: float, width_to: float) -> Points:
    """The outline of a line that grows from one width to another."""
    p = np.asarray(path, float)
    tangent = np.gradient(p, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / np.maximum(
        np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9
    )
    half = np.linspace(width_from, width_to, len(p))[:, None] / 2
    return np.concatenate([p + normal * half, (p - normal * half)[::-1]])


def _bezier(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], n: int = 12) -> np.ndarray:
    t = np.linspace(0, 1, n)[:, None]
    return (1 - t) ** 2 * np.array(a) + 2 * t * (1 - t) * np.array(b) + t**2 * np.array(c)


class _Part(NamedTuple):
    outline: Points
    fill: object
    """"coat", "shade" (the coat, darker) or an RGB colour."""


CREAM, ORANGE, BROWN, PINK, INK = (240, 228, 196), (240, 150, 40), (112, 72, 40), (232, 150, 150), (25, 22, 28)


def _head(species: str, rng: np.random.Generator, x: float, y: float, r: float) -> tuple[list[_Part], list[_Part]]:
    """The parts behind the head and those in front of it, for a head of radius `r` at (x, y), looking to the right."""
    wobble = lambda size: rng.uniform(-size, size)  # noqa: E731
    eye = [
        _Part(_ellipse(x + 0.35 * r, y - 0.2 * r, 0.17 * r, 0.2 * r), (250, 250, 250)),
        _Part(_ellipse(x + 0.4 * r, y - 0.18 * r, 0.1 * r, 0.12 * r), INK),
    ]
    skull = [_Part(_ellipse(x, y, r, r * 0.92), "coat")]
    if species == "cat":
        ears = [
            _Part(
                np.array(
                    [
                        [x + s * r - 0.42 * r, y - 0.55 * r],
                        [x + s * r + wobble(0.1) * r, y - 1.75 * r],
                        [x + s * r + 0.42 * r, y - 0.5 * r],
                    ]
                ),
                "shade",
            )
            for s in (-0.5, 0.5)
        ]
        whiskers = [
            _Part(_stroke([(x + 0.5 * r, y + 0.3 * r), (x + 1.6 * r, y + (0.3 + s) * r)], 0.09 * r, 0.05 * r), INK)
            for s in (-0.25, 0.1, 0.45)
        ]
        return ears, skull + eye + [_Part(_ellipse(x + 0.85 * r, y + 0.2 * r, 0.16 * r, 0.12 * r), PINK)] + whiskers
    if species == "rabbit":
        tilt = wobble(0.25)
        ears, inner = [], []
        for s in (-0.35, 0.3):
            cx, cy = x + s * r + tilt * r, y - 1.75 * r
            ears.append(_Part(_ellipse(cx, cy, 0.3 * r, 1.15 * r, tilt + s * 0.4), "coat"))
            inner.append(_Part(_ellipse(cx, cy, 0.14 * r, 0.85 * r, tilt + s * 0.4), PINK))
        return ears + inner, skull + eye
    if species == "elephant":
        trunk = _bezier((x + 0.6 * r, y), (x + 2.0 * r, y + 0.2 * r), (x + (1.5 + wobble(0.4)) * r, y + 2.1 * r))
        tusk = _bezier((x + 0.7 * r, y + 0.5 * r), (x + 1.3 * r, y + 1.0 * r), (x + 1.9 * r, y + 0.6 * r))
        ear = _Part(_ellipse(x - 0.65 * r, y + 0.1 * r, 0.85 * r, 1.1 * r, wobble(0.3)), "shade")
        return [], skull + [
            _Part(_stroke(trunk, 0.75 * r, 0.32 * r), "coat"),
            _Part(_stroke(tusk, 0.22 * r, 0.06 * r), CREAM),
            ear,
        ] + eye
    if species == "duck":
        gape = rng.uniform(0.05, 0.3)
        bill = [
            _Part(
                np.array(
                    [
                        [x + 0.7 * r, y - 0.3 * r],
                        [x + 2.0 * r, y - gape * r],
                        [x + 2.0 * r, y + 0.1 * r],
                        [x + 0.7 * r, y + 0.25 * r],
                    ]
                ),
                ORANGE,
            ),
            _Part(
                np.array(
                    [[x + 0.7 * r, y + 0.15 * r], [x + 1.8 * r, y + (0.25 + gape) * r], [x + 0.6 * r, y + 0.5 * r]]
                ),
                (214, 120, 30),
            ),
        ]
        crest = [
            _Part(
                _stroke(
                    _bezier(
                        (x - 0.2 * r, y - 0.7 * r), (x - 0.8 * r, y - 1.6 * r), (x - (1.4 + 0.3 * k) * r, y - 1.1 * r)
                    ),
                    0.3 * r,
                    0.08 * r,
                ),
                "shade",
            )
            for k in (0, 1)
        ]
        return crest, skull + bill + eye
    if species == "giraffe":
        horns = []
        for s in (-0.3, 0.25):
            tip = (x + (s * 1.5 + wobble(0.1)) * r, y - 1.6 * r)
            horns += [
                _Part(_stroke([(x + s * r, y - 0.5 * r), tip], 0.22 * r, 0.18 * r), "coat"),
                _Part(_ellipse(*tip, 0.24 * r, 0.24 * r), BROWN),
            ]
        muzzle = _Part(_ellipse(x + 0.8 * r, y + 0.35 * r, 0.75 * r, 0.48 * r, 0.35), CREAM)
        return horns, skull + [muzzle] + eye
    if species == "deer":
        antlers = []
        for s in (-1.0, 1.0):
            beam = _bezier(
                (x + 0.2 * s * r, y - 0.7 * r),
                (x + 1.3 * s * r, y - 1.3 * r),
                (x + (0.9 * s + wobble(0.2)) * r, y - 2.4 * r),
            )
            antlers.append(_Part(_stroke(beam, 0.26 * r, 0.14 * r), BROWN))
            for k, size in ((4, 0.7), (7, 0.6)):
                bx, by = beam[k]
                antlers.append(_Part(_stroke([(bx, by), (bx - 0.35 * s * r, by - size * r)], 0.2 * r, 0.1 * r), BROWN))
        nose = _Part(_ellipse(x + 0.95 * r, y + 0.25 * r, 0.2 * r, 0.2 * r), INK)
        return antlers, skull + [
            _Part(_ellipse(x + 0.65 * r, y + 0.3 * r, 0.55 * r, 0.42 * r, 0.2), "coat"),
            nose,
        ] + eye
    if species == "lion":
        n = 2 * int(rng.integers(11, 15))
        t = np.linspace(0, 2 * np.pi, n, endpoint=False) + wobble(0.3)
        radius = r * np.where(np.arange(n) % 2, 1.3, 1.85 + 0.15 * rng.random(n))
        mane = _Part(
            np.stack([x - 0.15 * r + radius * np.cos(t), y + radius * np.sin(t)], 1),
            (150 + wobble(25), 82 + wobble(15), 30),
        )
        return [mane], skull + [_Part(_ellipse(x + 0.8 * r, y + 0.25 * r, 0.25 * r, 0.2 * r), INK)] + eye
    if species == "ram":
        turn = np.linspace(0.2, 2 * np.pi * 1.35, 26)
        spiral = np.stack(
            [
                x - 0.45 * r + r * (1.05 - 0.115 * turn) * np.cos(turn - 2.1),
                y - 0.15 * r + r * (1.05 - 0.115 * turn) * np.sin(turn - 2.1),
            ],
            1,
        )
        return [], skull + [_Part(_ellipse(x + 0.75 * r, y + 0.3 * r, 0.5 * r, 0.4 * r, 0.3), CREAM)] + eye + [
            _Part(_stroke(spiral, 0.5 * r, 0.16 * r), (214, 190, 140))
        ]
    raise ToCoError(f"species is {species!r}; allowed: {', '.join(CLASS_NAMES[1:])}")


def _animal(species: str, rng: np.random.Generator) -> tuple[list[_Part], tuple[float, float]]:
    """All parts from back to front, and where the head is. Only head and neck depend on the species."""
    b = rng.uniform(0.48, 0.74)
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    power = rng.uniform(0.75, 1.0)
    body = np.stack(
        [
            np.sign(np.cos(t)) * np.abs(np.cos(t)) ** power,
            b * np.sign(np.sin(t)) * np.abs(np.sin(t)) ** power + rng.uniform(-0.12, 0.12) * np.cos(2 * t),
        ],
        1,
    )
    length, width = rng.uniform(0.3, 0.75), rng.uniform(0.17, 0.26)
    stand = rng.uniform(-0.18, 0.18, 4)
    legs = [
        _Part(_stroke([(x, 0.3 * b), (x + s, b + length)], width * 1.25, width), fill)
        for x, s, fill in zip((-0.62, 0.45, -0.4, 0.68), stand, ("shade", "shade", "coat", "coat"), strict=True)
    ]
    tail_end = (-1.0 - rng.uniform(0.25, 0.7), -rng.uniform(-0.5, 0.8))
    tail_path = _bezier((-0.9, -0.15), (-1.35, rng.uniform(-0.6, 0.3)), tail_end)
    tail = [_Part(_stroke(tail_path, 0.2, 0.1), "coat")]
    if rng.random() < 0.5:
        tail.append(_Part(_ellipse(*tail_end, 0.17, 0.14), "shade"))
    r = rng.uniform(0.4, 0.5)
    reach = rng.uniform(1.3, 1.7) if species == "giraffe" else rng.uniform(0.25, 0.5)
    lean = rng.uniform(0.15, 0.4)
    hx, hy = 0.78 + lean, -0.5 * b - reach - (0.0 if species == "giraffe" else 0.1)
    neck = _Part(_stroke([(0.62, -0.15 * b), (hx - 0.05, hy)], 0.62, 0.42), "coat")
    behind, front = _head(species, rng, hx, hy, r * (0.8 if species == "giraffe" else 1.0))
    return legs[:2] + tail + [neck, _Part(body, "coat")] + legs[2:] + behind + front, (hx, hy)


# ---- painting


def _fill(canvas: np.ndarray, outline: Points, colour: object) -> None:
    cv2.fillPoly(canvas, [np.round(outline).astype(np.int32)], colour)


def _paint_animal(
    image: np.ndarray,
    mask: np.ndarray,
    label: int,
    coat: int,
    centre: tuple[float, float],
    unit: float,
    rng: np.random.Generator,
) -> None:
    """Draw one animal in place. `centre` is its body's centre, `unit` half its body length, in pixels of the canvas."""
    H, W = mask.shape
    angle, flip = rng.uniform(-0.22, 0.22), rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * unit
    shapes, head = _animal(CLASS_NAMES[label], rng)
    at = (rotation @ head) * (flip, 1)
    margin = 0.55 * unit  # the head, which tells the species, is inside the picture
    centre = np.clip(centre + at, margin, np.array([W, H]) - margin) - at
    parts = [(((p.outline @ rotation.T) * (flip, 1) + centre), p.fill) for p in shapes]
    everything = np.concatenate([o for o, _ in parts])
    x0, y0 = np.clip(np.floor(everything.min(0) - 2), 0, (W, H)).astype(int)
    x1, y1 = np.clip(np.ceil(everything.max(0) + 3), 0, (W, H)).astype(int)
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    h, w = int(y1 - y0), int(x1 - x0)
    light, dark = _coat_colours(rng)
    field = cv2.GaussianBlur(_coat_field(COATS[coat], rng, h, w, unit), (0, 0), 0.8)[..., None]
    texture = light * (1 - field) + dark * field
    layer, alpha = np.zeros((h, w, 3), np.float32), np.zeros((h, w), np.uint8)
    for outline, fill in parts:
        outline = outline - (x0, y0)
        stencil = np.zeros((h, w), np.uint8)
        _fill(stencil, outline, 1)
        where = stencil.astype(bool)
        alpha |= stencil
        layer[where] = (
            texture[where] if fill == "coat" else texture[where] * 0.72 if fill == "shade" else np.float32(fill)
        )
        cv2.polylines(
            layer, [np.round(outline).astype(np.int32)], True, (38, 32, 40), max(1, round(unit * 0.025)), cv2.LINE_AA
        )
    relief = 1.12 - 0.3 * np.linspace(0, 1, h, dtype=np.float32)[:, None] + 0.12 * (_noise(rng, h, w, 3) - 0.5)
    layer = np.clip(layer * relief[..., None], 0, 255)
    outline_shade = cv2.GaussianBlur(np.pad(alpha, 0).astype(np.float32), (0, 0), unit * 0.12)
    region = image[y0:y1, x0:x1]
    region *= (1 - 0.35 * outline_shade)[..., None]
    where = alpha.astype(bool)
    region[where] = layer[where]
    mask[y0:y1, x0:x1][where] = label


def _blob(rng: np.random.Generator, cx: float, cy: float, radius: float, squash: float = 1.0, n: int = 14) -> Points:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    wave = radius * (1 + 0.35 * (rng.random(n) - 0.5))
    return np.stack([cx + wave * np.cos(t), cy + squash * wave * np.sin(t)], 1)


def _paint_textured(
    image: np.ndarray,
    outline: Points,
    texture_kind: str,
    rng: np.random.Generator,
    unit: float,
    colours: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """A background thing with a texture; returns where it was painted."""
    stencil = np.zeros(image.shape[:2], np.uint8)
    _fill(stencil, outline, 1)
    x, y, w, h = cv2.boundingRect(stencil)
    if w < 3 or h < 3:
        return stencil.astype(bool)
    field = _coat_field(texture_kind, rng, h, w, unit)[..., None]
    where = stencil[y : y + h, x : x + w].astype(bool)
    relief = np.linspace(1.1, 0.75, h, dtype=np.float32)[:, None, None]
    image[y : y + h, x : x + w][where] = np.clip((colours[0] * (1 - field) + colours[1] * field) * relief, 0, 255)[
        where
    ]
    return stencil.astype(bool)


def _backdrop(H: int, W: int, rng: np.random.Generator) -> np.ndarray:
    """Sky or wall, ground, hills, trees, bushes and stones: float32 H W 3."""
    far, near = _colour(rng, (0.1, 0.6), (0.5, 1.0)), _colour(rng, (0.2, 0.75), (0.3, 0.8))
    y = np.linspace(0, 1, H, dtype=np.float32)[:, None, None]
    cloud = _noise(rng, H, W, rng.uniform(3, 6), octaves=4)[..., None]
    image = far * (0.75 + 0.3 * y + 0.3 * (cloud - 0.5))
    horizon = rng.uniform(0.25, 0.6) * H
    for depth in np.linspace(0, 1, int(rng.integers(1, 4))):
        ridge = horizon + depth * 0.2 * H + 0.18 * H * (_noise(rng, 2, W, rng.uniform(2, 6))[0] - 0.5)
        colour = far * (0.6 - 0.5 * depth) + near * (0.4 + 0.5 * depth)
        grain = _noise(rng, H, W, rng.uniform(6, 22), octaves=3)[..., None]
        image = np.where((np.arange(H)[:, None] > ridge[None])[..., None], colour * (0.7 + 0.55 * grain), image)
    S = max(H, W)
    for _ in range(int(rng.integers(0, 4))):  # trees
        x, base = rng.uniform(0, W), horizon + rng.uniform(0.0, 0.35) * H
        top = base - rng.uniform(0.3, 0.7) * H
        bark, leaf = _colour(rng, (0.2, 0.6), (0.2, 0.5)), _colour(rng, (0.3, 0.8), (0.25, 0.8))
        _paint_textured(
            image,
            _stroke([(x, base), (x + rng.uniform(-6, 6), top)], 0.05 * S, 0.03 * S),
            "mottled",
            rng,
            S / 10,
            (bark, bark * 0.6),
        )
        for _ in range(int(rng.integers(2, 5))):
            crown = _blob(
                rng, x + rng.uniform(-0.1, 0.1) * S, top + rng.uniform(-0.06, 0.08) * S, rng.uniform(0.05, 0.12) * S
            )
            _paint_textured(image, crown, "mottled", rng, S / 14, (leaf, leaf * 0.65))
    for _ in range(int(rng.integers(2, 7))):  # stones and bushes; some wear a coat
        radius = rng.uniform(0.04, 0.13) * S
        outline = _blob(rng, rng.uniform(0, W), rng.uniform(horizon, H), radius, rng.uniform(0.5, 1.0))
        if rng.random() < 0.4:
            kind, colours = COATS[rng.integers(len(COATS))], _coat_colours(rng)
        else:
            stone = _colour(rng, (0.05, 0.6), (0.3, 0.8))
            kind, colours = "mottled", (stone, stone * 0.7)
        _paint_textured(image, outline, kind, rng, rng.uniform(0.08, 0.18) * S, colours)
    return np.clip(image, 0, 255).astype(np.float32)


def _paint_foreground(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Grass, leaves and posts in front of everything: they hide animals and are background in the mask."""
    H, W = mask.shape
    S = max(H, W)
    for _ in range(int(rng.integers(0, 4))):  # tufts of grass
        x0, colour = rng.uniform(0, W), _colour(rng, (0.3, 0.8), (0.25, 0.8))
        base = rng.uniform(0.75, 1.05) * H
        for _ in range(int(rng.integers(4, 9))):
            x, lean, tall = x0 + rng.uniform(-0.07, 0.07) * S, rng.uniform(-0.06, 0.06) * S, rng.uniform(0.08, 0.22) * S
            blade = _stroke(_bezier((x, base), (x, base - tall / 2), (x + lean, base - tall)), 0.014 * S, 0.003 * S)
            _fill(image, blade, tuple(float(c) for c in colour * rng.uniform(0.7, 1.2)))
            _fill(mask, blade, 0)
    if rng.random() < 0.25:  # a post
        x, bark = rng.uniform(0.1, 0.9) * W, _colour(rng, (0.1, 0.5), (0.25, 0.6))
        where = _paint_textured(
            image,
            _stroke([(x, H + 2.0), (x + rng.uniform(-8, 8), rng.uniform(-0.1, 0.5) * H)], 0.045 * S, 0.035 * S),
            "mottled",
            rng,
            S / 12,
            (bark, bark * 0.7),
        )
        mask[where] = 0


def _finish(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """From the supersampled canvas to the picture, with light, a little sensor noise and the void rim."""
    H, W = mask.shape[0] // SUPERSAMPLE, mask.shape[1] // SUPERSAMPLE
    small = cv2.resize(image, (W, H), interpolation=cv2.INTER_AREA)
    labels = mask[SUPERSAMPLE // 2 :: SUPERSAMPLE, SUPERSAMPLE // 2 :: SUPERSAMPLE].copy()
    glow = 0.85 + 0.3 * _noise(rng, H, W, 2)
    small = small * (glow * rng.uniform(0.85, 1.1))[..., None] + rng.normal(0, 4, (H, W, 1)).astype(np.float32)
    kernel = np.ones((3, 3), np.uint8)
    rim = cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)
    labels[rim] = VOID
    return np.clip(np.round(small), 0, 255).astype(np.uint8), labels


def draw_scene(
    rng: np.random.Generator,
    height: int = 96,
    width: int = 128,
    *,
    n_animals: int | None = None,
    label: int | None = None,
    body: tuple[float, float] = (0.13, 0.24),
    usual_coat: float = 0.7,
) -> Scene:
    """Draw one scene.

    Args:
        rng: all randomness; the same state gives the same scene.
        height, width: of the picture in pixels.
        n_animals: how many; by default one to four. Up to three species are mixed.
        label: 1..8 to draw only this species.
        usual_coat: the chance that an animal wears its species' usual coat rather than any.
        body: half the body length as a fraction of the longer side, lowest and highest.
    """
    if height < 16 or width < 16:
        raise ToCoError(f"a scene of {height} x {width} pixels is too small; allowed: 16 x 16 and more")
    if label is not None and not 1 <= label < len(CLASS_NAMES):
        raise ToCoError(f"label is {label}; allowed: 1..{len(CLASS_NAMES) - 1}")
    H, W = height * SUPERSAMPLE, width * SUPERSAMPLE
    image, mask = _backdrop(H, W, rng), np.zeros((H, W), np.uint8)
    n = int(rng.choice([1, 2, 3, 4], p=[0.25, 0.35, 0.25, 0.15])) if n_animals is None else n_animals
    species = rng.permutation(np.arange(1, len(CLASS_NAMES)))[: int(rng.integers(1, 4))] if label is None else [label]
    centres: list[tuple[float, float]] = []
    coats = []
    for i in range(n):
        unit = rng.uniform(*body) * max(H, W) * (0.85 if n > 2 else 1.0)
        places = [(rng.uniform(0.16, 0.84) * W, rng.uniform(0.42, 0.8) * H) for _ in range(12)]
        room = [min((np.hypot(x - a, y - b) for a, b in centres), default=0.0) for x, y in places]
        centre = places[int(np.argmax(room[:4]))]
        centres.append(centre)
        kind = CLASS_NAMES[int(species[i % len(species)])]
        usual = usual_coat > 0 and rng.random() < usual_coat
        coats.append(COATS.index(USUAL_COAT[kind]) if usual else int(rng.integers(len(COATS))))
        _paint_animal(image, mask, int(species[i % len(species)]), coats[-1], centre, unit, rng)
    _paint_foreground(image, mask, rng)
    picture, labels = _finish(image, mask, rng)
    return Scene(picture, labels, tuple(coats))


# ---- the data set on disk


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """What is written to disk. Two equal configs give byte-identical folders on one machine."""

    seed: int = 0
    """Seed of the whole data set."""
    n_train: int = 640
    """Images of the train part."""
    n_val: int = 160
    """Images of the val part, for choices such as the threshold."""
    n_test: int = 240
    """Images of the test part, for the reported numbers only."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < (0 if name == "seed" else 1):
                raise ToCoError(f"{name} is {value!r}; allowed: a whole number, at least {0 if name == 'seed' else 1}")


def scene_of(config: ScenesConfig, split: str, index: int) -> Scene:
    """Scene `index` of a part: two thirds are 96 x 128, the others 128 x 96."""
    rng = np.random.default_rng([VERSION, config.seed, ("train", "val", "test").index(split), index])
    return draw_scene(rng, *((96, 128) if rng.random() < 2 / 3 else (128, 96)))


def cache_folder() -> Path:
    """Where generated data is kept: `$TOCO_CACHE`, else `$XDG_CACHE_HOME/toco`, else `~/.cache/toco`."""
    if os.environ.get("TOCO_CACHE"):
        return Path(os.environ["TOCO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toco"


def scenes_folder(config: ScenesConfig | None = None, *, progress: bool = True) -> Path:
    """The folder of the embedded data set; it is drawn first where it is not there yet.

    The folder is drawn beside its final place and renamed when complete, so an interrupted drawing is never mistaken
    for a finished one, and two processes that draw at the same time do not disturb each other. Raises ToCoError where
    the cache folder cannot be written.
    """
    config = config or ScenesConfig()
    name = _folder_name(config)
    root = cache_folder() / name
    if os.path.isfile(root / "scenes.json"):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with alone(root, "draws", tell=progress):
            if not os.path.isfile(root / "scenes.json"):  # the process that was waited for may have drawn it
                remove_parts(root.parent, f".{name}-*")
                if root.exists():  # left without its manifest: not ours to trust
                    shutil.rmtree(root)
                with whole_folder(root) as work:
                    write_scenes(work, config, progress=progress)
    except OSError as error:
        if not os.path.isfile(root / "scenes.json"):  # otherwise another user was faster, whose folder is the same
            raise ToCoError(
                f"the embedded data set cannot be written to {root.parent}: {error.strerror or error}; "
                "set TOCO_CACHE to a folder that can be"
            ) from error
    return root


def drawing_of(root: Path | str | None) -> str | None:
    """The version and numbers of the drawing where `root` is a finished folder of `scenes_folder`; None elsewhere."""
    if root is None or Path(root).parent.resolve() != cache_folder().resolve():
        return None
    try:
        values = json.loads((Path(root) / "scenes.json").read_text())
        version, name = values.pop("version"), _folder_name(ScenesConfig(**values))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ToCoError):
        return None
    return name if version == VERSION and Path(root).name == name else None


def _folder_name(config: ScenesConfig) -> str:
    return f"scenes-v{VERSION}-seed{config.seed}-{config.n_train}-{config.n_val}-{config.n_test}"


def write_scenes(root: Path, config: ScenesConfig, *, progress: bool = True) -> None:
    """Write all parts in VOC layout; `scenes.json` comes last and says what was written."""
    from PIL import Image
    from tqdm import tqdm

    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    palette = voc_palette().tobytes()

    def write(job: tuple[str, int]) -> None:
        split, index = job
        scene = scene_of(config, split, index)
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"{split}_{index:05d}.jpg", quality=95)
        mask = Image.fromarray(scene.mask, mode="P")
        mask.putpalette(palette)
        mask.save(root / "SegmentationClass" / f"{split}_{index:05d}.png")

    parts = {"train": config.n_train, "val": config.n_val, "test": config.n_test}
    jobs = [(split, i) for split, n in parts.items() for i in range(n)]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for _ in tqdm(
            pool.map(write, jobs), total=len(jobs), desc="drawing the scenes", disable=not progress, file=sys.stdout
        ):
            pass
    for split, n in parts.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
            "".join(f"{split}_{i:05d}\n" for i in range(n))
        )
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    (root / "scenes.json").write_text(json.dumps({"version": VERSION, **asdict(config)}, indent=2) + "\n")
