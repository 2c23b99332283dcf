"""Paper, paint and light: coats, backdrops and how an animal is laid onto the picture.

Backdrops are painted at the size of the picture, animals and what hides them at twice that size (see
`scenes.draw_scene`), so that edges are smooth and the mask has the animals' own outline.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from .shapes import INK, Part, Points, bezier, stroke
from .species import COATS, SPECIES, Species, animal

Colour = np.ndarray
"""RGB, float32, in [0, 255]."""


def noise(rng: np.random.Generator, h: int, w: int, cells: float, octaves: int = 1) -> np.ndarray:
    """Smooth noise in [0, 1], about `cells` cells along the longer side; each octave halves cell and amplitude."""
    total, amplitude = np.zeros((h, w), np.float32), 1.0
    for _ in range(octaves):
        gh, gw = max(2, round(cells * h / max(h, w)) + 1), max(2, round(cells * w / max(h, w)) + 1)
        total += amplitude * cv2.resize(rng.random((gh, gw), np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
        cells, amplitude = cells * 2, amplitude / 2
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Hue in 0..180 (wraps round), saturation and value in 0..1 (cut off)."""
    pixel = np.array([[[hue % 180, 255 * min(saturation, 1.0), 255 * min(value, 1.0)]]]).astype(np.uint8)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def random_colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    return hsv(rng.uniform(0, 180), rng.uniform(*saturation), rng.uniform(*value))


def coat_colours(species: Species, rng: np.random.Generator) -> tuple[Colour, Colour]:
    """First and second colour of a species' coat."""
    h, s, v = (rng.uniform(*bounds) for bounds in species.light)
    shift, more, less = species.dark
    return hsv(h, s, v), hsv(h + shift, s * more, v * less)


def coat_field(kind: str, rng: np.random.Generator, h: int, w: int, unit: float) -> np.ndarray:
    """How much of the second colour stands at each pixel, in [0, 1]. `unit` is half the body length in pixels."""
    period = unit * rng.uniform(0.36, 0.5)
    if kind == "plain":
        return 0.3 * noise(rng, h, w, 3)
    if kind == "wool":
        return 0.9 * noise(rng, h, w, 2.2 * max(h, w) / (0.4 * unit)) ** 2
    if kind == "patches":
        return (noise(rng, h, w, 1.1 * max(h, w) / unit, octaves=2) > 0.52).astype(np.float32)
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    warp = (noise(rng, h, w, 4) - 0.5) * period
    angle = rng.uniform(-0.5, 0.5)
    u = (np.cos(angle) * x + np.sin(angle) * y + warp) * (2 * np.pi / period)
    if kind == "stripes":
        return (np.sin(u) > 0.15).astype(np.float32)
    v = (-np.sin(angle) * x + np.cos(angle) * y + warp) * (2 * np.pi / period)
    if kind == "spots":
        return (np.cos(1.15 * u) + np.cos(1.15 * v) > 0.7).astype(np.float32)
    if kind == "net":
        return (np.abs(np.sin(0.42 * u + 0.6 * np.sin(0.4 * v)) * np.sin(0.42 * v)) > 0.22).astype(np.float32)
    raise ValueError(f"coat is {kind!r}; allowed: {', '.join(COATS)}")


def fill(canvas: np.ndarray, outline: Points, colour: object, *, smooth: bool = False) -> None:
    """Fill a polygon; `smooth` with soft edges, to a 64th of a pixel."""
    if smooth:
        cv2.fillPoly(canvas, [np.round(outline * 64).astype(np.int32)], colour, cv2.LINE_AA, shift=6)
    else:
        cv2.fillPoly(canvas, [np.round(outline).astype(np.int32)], colour)


def paint_animal(
    image: np.ndarray,
    mask: np.ndarray,
    label: int,
    species: Species,
    coat: str,
    colours: tuple[Colour, Colour],
    centre: tuple[float, float],
    unit: float,
    rng: np.random.Generator,
) -> None:
    """Lay one animal onto `image` (float32 H W 3) and write `label` where it is into `mask` (uint8 H W).

    `centre` is its body's centre and `unit` half its body length, in pixels; it moves so that the head is inside.
    """
    H, W = mask.shape
    angle, flip = rng.uniform(-0.16, 0.16), rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * unit
    parts, head = animal(species, rng)
    at = (rotation @ head) * (flip, 1)
    margin = 0.6 * unit
    centre = np.clip(np.asarray(centre) + at, margin, np.array([W, H]) - margin) - at
    parts = [Part((part.outline @ rotation.T) * (flip, 1) + centre, part.fill) for part in parts]
    everything = np.concatenate([part.outline for part in parts])
    x0, y0 = np.clip(np.floor(everything.min(0) - 0.35 * unit), 0, (W, H)).astype(int)
    x1, y1 = np.clip(np.ceil(everything.max(0) + 0.35 * unit), 0, (W, H)).astype(int)
    h, w = int(y1 - y0), int(x1 - x0)
    if h < 2 or w < 2:
        return
    # Every piece of paper has a number; two tables turn numbers into its first and its second colour.
    sheet, first, second = np.zeros((h, w), np.uint8), [np.zeros(3, np.float32)], [np.zeros(3, np.float32)]
    line = max(1, round(unit * 0.03))
    for number, part in enumerate(parts, 1):
        outline = part.outline - (x0, y0)
        fill(sheet, outline, number)
        cv2.polylines(sheet, [np.round(outline).astype(np.int32)], True, 255, line)
        pair = {"coat": colours, "shade": (colours[0] * 0.74, colours[1] * 0.74), "second": (colours[1], colours[1])}
        one, two = pair.get(part.fill, (part.fill, part.fill)) if isinstance(part.fill, str) else (part.fill, part.fill)
        first.append(np.asarray(one, np.float32))
        second.append(np.asarray(two, np.float32))
    tables = []
    for colour in (first, second):
        table = np.zeros((256, 3), np.float32)
        table[: len(colour)] = colour
        table[255] = np.minimum(INK, 0.5 * colours[0])
        tables.append(table)
    field = cv2.GaussianBlur(coat_field(coat, rng, h, w, unit), (0, 0), 0.8)[..., None]
    layer, other = (table.take(sheet, axis=0) for table in tables)
    other -= layer
    other *= field
    layer += other
    relief = 1.12 - 0.26 * np.linspace(0, 1, h, dtype=np.float32)[:, None] + 0.1 * (noise(rng, h, w, 3) - 0.5)
    layer *= relief[..., None]
    np.clip(layer, 0, 255, out=layer)
    where = sheet > 0
    region = image[y0:y1, x0:x1]
    shadow = cv2.GaussianBlur(cv2.resize(where.astype(np.float32), (w // 4 + 1, h // 4 + 1)), (0, 0), unit * 0.035)
    region *= (1 - 0.4 * cv2.resize(shadow, (w, h)))[..., None]
    np.copyto(region, layer, where=where[..., None])
    mask[y0:y1, x0:x1][where] = label


# ---- backdrops


def blob(rng: np.random.Generator, cx: float, cy: float, radius: float, squash: float = 1.0, n: int = 14) -> Points:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    wave = radius * (1 + 0.3 * (rng.random(n) - 0.5))
    return np.stack([cx + wave * np.cos(t), cy + squash * wave * np.sin(t)], 1)


PALETTES = {
    # sky above, sky below, far hills, ground, leaves: (hue, saturation, value)
    "meadow": ((104, 0.35, 0.95), (98, 0.12, 1.0), (62, 0.35, 0.66), (44, 0.5, 0.74), (52, 0.6, 0.5)),
    "savanna": ((14, 0.45, 0.98), (22, 0.25, 1.0), (14, 0.42, 0.66), (21, 0.48, 0.86), (34, 0.55, 0.5)),
    "lake": ((100, 0.3, 0.98), (96, 0.1, 1.0), (76, 0.3, 0.58), (97, 0.42, 0.76), (58, 0.5, 0.5)),
    "forest": ((70, 0.2, 0.9), (60, 0.15, 0.95), (66, 0.42, 0.42), (26, 0.38, 0.5), (64, 0.6, 0.36)),
    "snow": ((112, 0.25, 0.85), (150, 0.08, 0.97), (108, 0.22, 0.68), (108, 0.06, 0.95), (80, 0.3, 0.4)),
}  # fmt: skip


def _shade(rng: np.random.Generator, colour: tuple[float, float, float]) -> Colour:
    """A palette's colour as it is today: hue, saturation and value vary."""
    h, s, v = colour
    return hsv(h + rng.normal(0, 7), s * rng.uniform(0.7, 1.3), v * rng.uniform(0.85, 1.08))


def paint_textured(image: np.ndarray, outline: Points, light: Colour, dark: Colour, field: np.ndarray | None) -> None:
    """A thing of the backdrop, `field` (H W in [0, 1]) of its second colour; None: shaded from top to bottom."""
    stencil = np.zeros(image.shape[:2], np.uint8)
    fill(stencil, outline, 255, smooth=True)
    x, y, w, h = cv2.boundingRect(outline.astype(np.float32).reshape(-1, 1, 2))
    y0, y1, x0, x1 = max(y - 1, 0), min(y + h + 1, len(image)), max(x - 1, 0), min(x + w + 1, image.shape[1])
    if y1 <= y0 or x1 <= x0:
        return
    alpha = (stencil[y0:y1, x0:x1].astype(np.float32) / 255)[..., None]
    part = np.linspace(0, 1, y1 - y0, dtype=np.float32)[:, None] if field is None else field[y0:y1, x0:x1]
    region = image[y0:y1, x0:x1]
    region += ((light + (dark - light) * part[..., None]) - region) * alpha


def backdrop(H: int, W: int, habitat: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Sky, hills, ground, trees, stones and flowers of a habitat: float32 H W 3, and where the horizon is (pixels)."""
    S = max(H, W)
    top, low, far, near, leaf = (_shade(rng, colour) for colour in PALETTES[habitat])
    y = np.linspace(0, 1, H, dtype=np.float32)[:, None, None]
    grain = noise(rng, H, W, rng.uniform(10, 18), octaves=3)
    cloud = noise(rng, H, W, rng.uniform(2, 5), octaves=3)[..., None]
    image = top + (low - top) * np.clip(1.8 * y, 0, 1) + 26 * (cloud - 0.5)
    horizon = rng.uniform(0.26, 0.5) * H
    x = np.arange(W + 1, dtype=float)
    depths = np.linspace(0, 1, int(rng.integers(2, 4)))
    for depth in depths:
        line = (
            horizon + depth * 0.16 * H + (0.16 - 0.1 * depth) * H * (noise(rng, 2, W + 1, rng.uniform(2, 5))[0] - 0.5)
        )
        outline = np.concatenate([np.stack([x, line], 1), [[W + 1, H + 1], [-1, H + 1]]])
        colour = far + (near - far) * depth
        paint_textured(image, outline, colour * 1.08, colour * 0.78, grain)
    if habitat == "lake":  # ripples
        ripple = np.sin(np.arange(H, dtype=np.float32) * rng.uniform(0.8, 1.3) + 4 * noise(rng, H, W, 3).T.mean(0))
        image[int(horizon + 0.15 * H) :] += (9 * ripple[int(horizon + 0.15 * H) :, None, None]).astype(np.float32)
    _trees(image, habitat, horizon, leaf, grain, rng)
    for _ in range(int(rng.integers(2, 6))):  # stones and bushes; some wear a coat as animals do
        radius = rng.uniform(0.035, 0.1) * S
        outline = blob(rng, rng.uniform(0, W), rng.uniform(horizon + 0.1 * H, H), radius, rng.uniform(0.5, 0.9))
        if rng.random() < 0.35:
            light, dark = coat_colours(SPECIES[rng.integers(len(SPECIES))], rng)
            field = cv2.GaussianBlur(
                coat_field(COATS[rng.integers(len(COATS))], rng, H, W, rng.uniform(0.1, 0.2) * S), (0, 0), 0.7
            )
            paint_textured(image, outline, 0.9 * light, 0.9 * dark, field)
        else:
            light = _shade(rng, (105, 0.1, 0.62)) if rng.random() < 0.5 else leaf * rng.uniform(0.8, 1.25)
            paint_textured(image, outline, light * 1.1, light * 0.66, grain if rng.random() < 0.5 else None)
    if habitat in ("meadow", "forest"):  # flowers, mushrooms
        petal = random_colour(rng, (0.5, 0.8), (0.85, 1.0))
        for _ in range(int(rng.integers(4, 16))):
            at = (rng.uniform(0, W), rng.uniform(horizon + 0.2 * H, H))
            fill(image, blob(rng, *at, rng.uniform(0.007, 0.016) * S, n=7), tuple(map(float, petal)), smooth=False)
    return np.clip(image, 0, 255).astype(np.float32), horizon


def _trees(
    image: np.ndarray, habitat: str, horizon: float, leaf: Colour, grain: np.ndarray, rng: np.random.Generator
) -> None:
    """Trees that suit the habitat: firs, round ones, flat acacias, reeds at the lake."""
    H, W = image.shape[:2]
    S = max(H, W)
    n = {"forest": (3, 7), "snow": (1, 5), "meadow": (0, 3), "savanna": (0, 3), "lake": (0, 3)}[habitat]
    for _ in range(int(rng.integers(*n))):
        x, base = rng.uniform(0, W), horizon + rng.uniform(0.04, 0.3) * H
        tall = rng.uniform(0.25, 0.5) * H
        bark, green = _shade(rng, (12, 0.45, 0.4)), leaf * rng.uniform(0.75, 1.25)
        trunk = stroke([(x, base), (x + rng.uniform(-3, 3), base - tall)], 0.04 * S, 0.025 * S)
        paint_textured(image, trunk, bark, bark * 0.7, grain)
        if habitat in ("snow", "forest") and rng.random() < 0.75:
            for k in range(3):
                half, at = (0.1 - 0.02 * k) * S, base - (0.2 + 0.3 * k) * tall
                fir = np.array([[x - half, at], [x, at - 0.5 * tall], [x + half, at]])
                light = hsv(105, 0.04, 0.97) if habitat == "snow" and k == 2 else green
                paint_textured(image, fir, light, green * 0.7, None)
        else:
            squash = 0.35 if habitat == "savanna" else 0.9
            for _ in range(int(rng.integers(2, 4))):
                cx, cy = x + rng.uniform(-0.07, 0.07) * S, base - tall + rng.uniform(-0.04, 0.05) * S
                crown = blob(rng, cx, cy, rng.uniform(0.07, 0.12) * S, squash)
                paint_textured(image, crown, green * 1.15, green * 0.7, grain)


def paint_foreground(image: np.ndarray, mask: np.ndarray, habitat: str, rng: np.random.Generator) -> None:
    """Grass, reeds and posts in front of everything: they hide animals and are background in the mask."""
    H, W = mask.shape
    S = max(H, W)
    leaf = _shade(rng, PALETTES[habitat][4])
    for _ in range(int(rng.integers(0, 4))):
        x0, base = rng.uniform(0, W), rng.uniform(0.85, 1.06) * H
        for _ in range(int(rng.integers(5, 10))):
            x, lean, tall = x0 + rng.uniform(-0.08, 0.08) * S, rng.uniform(-0.06, 0.06) * S, rng.uniform(0.08, 0.2) * S
            blade = stroke(bezier((x, base), (x, base - tall / 2), (x + lean, base - tall), 6), 0.016 * S, 0.004 * S)
            fill(image, blade, tuple(float(c) for c in leaf * rng.uniform(0.7, 1.3)))
            fill(mask, blade, 0)
    if rng.random() < 0.15:
        x, bark = rng.uniform(0.1, 0.9) * W, _shade(rng, (12, 0.4, 0.42))
        post = stroke([(x, H + 2.0), (x + rng.uniform(-8, 8), rng.uniform(0.1, 0.55) * H)], 0.042 * S, 0.036 * S)
        fill(image, post, tuple(float(c) for c in bark))
        fill(image, post * [1, 1] + [0.012 * S, 0], tuple(float(c) for c in bark * 0.75))
        fill(mask, post, 0)
        fill(mask, post + [0.012 * S, 0], 0)


def species_for(habitat: str, rng: np.random.Generator, n: int, among: Sequence[int], loyalty: float) -> list[int]:
    """`n` different species out of `among`; those at home in the habitat are `loyalty` times as likely as others."""
    weight = np.array([loyalty if SPECIES[i].habitat == habitat else 1.0 for i in among])
    return [int(i) for i in rng.choice(np.asarray(among), size=n, replace=False, p=weight / weight.sum())]
