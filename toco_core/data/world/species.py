"""The species of the embedded world: bodies, heads, colours, coats and habitats of their own.

What a species usually looks like is in its row of `SPECIES`; how it is cut from paper is in `animal`. Every species has
a head of its own, which tells it for certain. Its build, colour and coat are usual and not certain: proportions
overlap, and one animal in four wears a colour or a coat that is another's. The first eight species are the classes of
the data set; the backbone is pretrained on all of them, as ImageNet has more classes than PASCAL VOC.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .shapes import (
    BROWN,
    CREAM,
    GREY,
    HORN,
    INK,
    IVORY,
    ORANGE,
    PINK,
    WHITE,
    Part,
    bezier,
    ellipse,
    ring,
    spiky,
    stroke,
    wavy,
)  # fmt: skip

COATS = ("plain", "stripes", "spots", "patches", "net", "wool")
HABITATS = ("meadow", "savanna", "lake", "forest", "snow")


class Species(NamedTuple):
    """A row of the zoo. Lengths in half body lengths; hue 0..180, saturation and value 0..1 (OpenCV's HSV)."""

    name: str
    head: str
    light: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    """Lowest and highest hue, saturation and value of the coat's first colour."""
    dark: tuple[float, float, float]
    """Of the second colour: factor of hue shift (added), of saturation and of value (multiplied)."""
    coat: str
    habitat: str
    body: float
    """Half the body's height."""
    legs: tuple[float, float]
    """Length below the body, and width."""
    neck: tuple[float, float]
    """How far the head stands above the back, and the neck's width."""
    skull: float
    """The head's radius."""
    tail: str
    outline: str = "smooth"
    """"smooth", "wool" or "spikes"."""


SPECIES = (
    Species("cat", "cat", ((8, 15), (0.6, 0.85), (0.85, 1.0)), (0, 1.1, 0.6), "stripes", "meadow", 0.44, (0.42, 0.2), (0.22, 0.5), 0.46, "long"),
    Species("deer", "deer", ((9, 14), (0.5, 0.7), (0.55, 0.75)), (4, 0.3, 1.6), "spots", "forest", 0.42, (0.74, 0.13), (0.5, 0.38), 0.38, "stub"),
    Species("duck", "duck", ((78, 100), (0.35, 0.6), (0.6, 0.85)), (0, 0.3, 1.35), "plain", "lake", 0.52, (0.26, 0.1), (0.42, 0.36), 0.4, "fan"),
    Species("elephant", "elephant", ((105, 125), (0.08, 0.22), (0.55, 0.75)), (0, 1.2, 0.8), "plain", "savanna", 0.72, (0.5, 0.36), (0.12, 0.7), 0.5, "thin"),
    Species("giraffe", "giraffe", ((20, 26), (0.45, 0.65), (0.88, 1.0)), (-9, 1.4, 0.55), "net", "savanna", 0.46, (0.86, 0.15), (1.45, 0.36), 0.34, "tuft"),
    Species("lion", "lion", ((17, 22), (0.5, 0.7), (0.8, 0.95)), (-3, 1.1, 0.75), "plain", "savanna", 0.46, (0.46, 0.24), (0.26, 0.55), 0.44, "tuft"),
    Species("rabbit", "rabbit", ((150, 172), (0.08, 0.28), (0.8, 1.0)), (0, 1.6, 0.7), "patches", "meadow", 0.58, (0.2, 0.26), (0.2, 0.5), 0.46, "puff"),
    Species("ram", "ram", ((22, 30), (0.08, 0.25), (0.88, 1.0)), (0, 1.4, 0.8), "wool", "snow", 0.6, (0.4, 0.16), (0.14, 0.5), 0.4, "stub", "wool"),
    # known to the backbone only
    Species("bear", "bear", ((8, 14), (0.55, 0.8), (0.3, 0.5)), (0, 1.0, 0.75), "plain", "forest", 0.62, (0.36, 0.3), (0.12, 0.6), 0.46, "stub"),
    Species("zebra", "horse", ((100, 120), (0.0, 0.08), (0.9, 1.0)), (0, 1.0, 0.22), "stripes", "savanna", 0.46, (0.66, 0.15), (0.5, 0.42), 0.38, "tuft"),
    Species("pig", "pig", ((168, 178), (0.25, 0.45), (0.88, 1.0)), (0, 1.2, 0.85), "plain", "meadow", 0.62, (0.26, 0.22), (0.06, 0.6), 0.44, "curl"),
    Species("fox", "fox", ((4, 10), (0.75, 0.95), (0.75, 0.95)), (8, 0.1, 1.3), "plain", "forest", 0.4, (0.46, 0.15), (0.2, 0.42), 0.4, "brush"),
    Species("cow", "cow", ((100, 120), (0.0, 0.06), (0.9, 1.0)), (0, 1.0, 0.25), "patches", "meadow", 0.58, (0.5, 0.2), (0.16, 0.55), 0.42, "tuft"),
    Species("horse", "horse", ((8, 14), (0.6, 0.85), (0.4, 0.65)), (0, 1.0, 0.6), "plain", "meadow", 0.46, (0.7, 0.16), (0.52, 0.42), 0.38, "brush"),
    Species("hedgehog", "fox", ((14, 22), (0.3, 0.5), (0.4, 0.6)), (0, 1.0, 1.5), "stripes", "forest", 0.56, (0.14, 0.16), (0.0, 0.4), 0.34, "none", "spikes"),
    Species("wolf", "fox", ((105, 120), (0.06, 0.2), (0.5, 0.7)), (0, 1.0, 0.6), "patches", "snow", 0.44, (0.56, 0.17), (0.26, 0.45), 0.42, "brush"),
    Species("tiger", "bear", ((9, 14), (0.75, 0.95), (0.88, 1.0)), (0, 1.0, 0.2), "stripes", "forest", 0.48, (0.4, 0.24), (0.2, 0.5), 0.46, "long"),
    Species("panda", "bear", ((100, 120), (0.0, 0.05), (0.92, 1.0)), (0, 1.0, 0.2), "patches", "forest", 0.64, (0.3, 0.3), (0.1, 0.6), 0.5, "stub"),
    Species("goat", "goat", ((14, 24), (0.15, 0.35), (0.7, 0.9)), (0, 1.3, 0.6), "patches", "snow", 0.48, (0.56, 0.14), (0.36, 0.42), 0.38, "stub"),
    Species("swan", "duck", ((100, 120), (0.0, 0.08), (0.93, 1.0)), (0, 1.0, 0.9), "plain", "lake", 0.5, (0.16, 0.1), (1.15, 0.24), 0.32, "fan"),
    Species("flamingo", "duck", ((165, 176), (0.4, 0.65), (0.92, 1.0)), (0, 1.3, 0.85), "plain", "lake", 0.44, (1.05, 0.08), (1.0, 0.2), 0.3, "fan"),
    Species("moose", "deer", ((8, 14), (0.55, 0.75), (0.28, 0.42)), (0, 1.0, 0.7), "plain", "snow", 0.58, (0.74, 0.17), (0.34, 0.5), 0.42, "stub"),
    Species("mouse", "mouse", ((105, 125), (0.04, 0.16), (0.6, 0.8)), (0, 1.0, 0.85), "plain", "meadow", 0.54, (0.14, 0.16), (0.02, 0.5), 0.44, "thin"),
    Species("frog", "frog", ((48, 64), (0.55, 0.85), (0.6, 0.9)), (-8, 1.2, 0.6), "spots", "lake", 0.5, (0.2, 0.26), (0.06, 0.6), 0.46, "none"),
)  # fmt: skip
NAMES = tuple(species.name for species in SPECIES)
N_CLASSES = 8
"""How many of them are classes of the data set: the first ones."""

BIRDS = ("duck",)
Parts = list[Part]


def _eye(x: float, y: float, r: float) -> Parts:
    return [
        Part(ellipse(x + 0.35 * r, y - 0.2 * r, 0.18 * r, 0.21 * r, n=14), WHITE),
        Part(ellipse(x + 0.41 * r, y - 0.18 * r, 0.1 * r, 0.13 * r, n=12), INK),
    ]


def _triangle_ear(x: float, y: float, r: float, at: float, tip: float, tall: float, fill: object) -> Part:
    base = np.array([[at - 0.4, -0.55], [at + tip, -tall], [at + 0.42, -0.5]])
    return Part(np.array([x, y]) + r * base, fill)


def _round_ears(x: float, y: float, r: float, size: float) -> Parts:
    return [
        part
        for s in (-0.6, 0.5)
        for part in (
            Part(ellipse(x + s * r, y - 0.85 * r, size * r, size * r, n=18), "shade"),
            Part(ellipse(x + s * r, y - 0.82 * r, 0.55 * size * r, 0.55 * size * r, n=14), PINK),
        )
    ]


def _cat(x, y, r, wobble) -> tuple[Parts, Parts]:
    ears = [_triangle_ear(x, y, r, s, wobble(0.1), 1.7, "shade") for s in (-0.5, 0.5)]
    whiskers = [
        Part(stroke([(x + 0.5 * r, y + 0.3 * r), (x + 1.55 * r, y + (0.3 + s) * r)], 0.09 * r, 0.05 * r), INK)
        for s in (-0.25, 0.1, 0.45)
    ]
    return ears, [Part(ellipse(x + 0.85 * r, y + 0.2 * r, 0.16 * r, 0.12 * r, n=12), PINK)] + whiskers


def _rabbit(x, y, r, wobble) -> tuple[Parts, Parts]:
    tilt, ears = wobble(0.25), []
    for s in (-0.35, 0.3):
        cx, cy = x + s * r + tilt * r, y - 1.75 * r
        ears += [
            Part(ellipse(cx, cy, 0.32 * r, 1.15 * r, tilt + s * 0.4), "coat"),
            Part(ellipse(cx, cy, 0.15 * r, 0.85 * r, tilt + s * 0.4, n=18), PINK),
        ]
    return ears, [Part(ellipse(x + 0.92 * r, y + 0.15 * r, 0.13 * r, 0.1 * r, n=12), PINK)]


def _elephant(x, y, r, wobble) -> tuple[Parts, Parts]:
    trunk = bezier((x + 0.6 * r, y), (x + 2.0 * r, y + 0.2 * r), (x + (1.5 + wobble(0.4)) * r, y + 2.1 * r))
    tusk = bezier((x + 0.7 * r, y + 0.5 * r), (x + 1.3 * r, y + 1.0 * r), (x + 1.9 * r, y + 0.6 * r))
    return [], [
        Part(stroke(trunk, 0.75 * r, 0.32 * r), "coat"),
        Part(stroke(tusk, 0.24 * r, 0.06 * r), CREAM),
        Part(ellipse(x - 0.65 * r, y + 0.1 * r, 0.9 * r, 1.15 * r, wobble(0.3)), "shade"),
    ]


def _duck(x, y, r, wobble) -> tuple[Parts, Parts]:
    gape = 0.17 + wobble(0.12)
    upper = [[0.7, -0.3], [2.0, -gape], [2.0, 0.1], [0.7, 0.25]]
    lower = [[0.7, 0.15], [1.8, 0.25 + gape], [0.6, 0.5]]
    crest = [
        Part(
            stroke(
                bezier((x - 0.2 * r, y - 0.7 * r), (x - 0.8 * r, y - 1.6 * r), (x - (1.4 + 0.3 * k) * r, y - 1.1 * r)),
                0.3 * r,
                0.08 * r,
            ),
            "shade",
        )
        for k in (0, 1)
    ]
    at = np.array([x, y])
    return crest, [Part(at + r * np.array(upper), ORANGE), Part(at + r * np.array(lower), (214, 120, 30))]


def _giraffe(x, y, r, wobble) -> tuple[Parts, Parts]:
    horns = []
    for s in (-0.3, 0.25):
        tip = (x + (s * 1.5 + wobble(0.1)) * r, y - 1.6 * r)
        horns += [
            Part(stroke([(x + s * r, y - 0.5 * r), tip], 0.24 * r, 0.2 * r), "coat"),
            Part(ellipse(*tip, 0.24 * r, 0.24 * r, n=14), BROWN),
        ]
    return horns, [Part(ellipse(x + 0.8 * r, y + 0.35 * r, 0.75 * r, 0.48 * r, 0.35), CREAM)]


def _antlers(x, y, r, wobble, *, broad: float) -> Parts:
    antlers = []
    for s in (-1.0, 1.0):
        beam = bezier(
            (x + 0.2 * s * r, y - 0.7 * r),
            (x + 1.3 * s * r, y - 1.3 * r),
            (x + (0.9 * s + wobble(0.2)) * r, y - 2.4 * r),
        )
        antlers.append(Part(stroke(beam, 0.28 * r, broad * r), BROWN))
        for k, size in ((4, 0.7), (7, 0.6)):
            bx, by = beam[k]
            antlers.append(Part(stroke([(bx, by), (bx - 0.35 * s * r, by - size * r)], 0.22 * r, 0.1 * r), BROWN))
    return antlers


def _deer(x, y, r, wobble) -> tuple[Parts, Parts]:
    return _antlers(x, y, r, wobble, broad=0.14), [
        Part(ellipse(x + 0.65 * r, y + 0.3 * r, 0.55 * r, 0.42 * r, 0.2), "coat"),
        Part(ellipse(x + 1.05 * r, y + 0.25 * r, 0.2 * r, 0.2 * r, n=12), INK),
    ]


def _lion(x, y, r, wobble) -> tuple[Parts, Parts]:
    points = 12
    outer = r * (1.85 + 0.15 * np.sin(7.3 * np.arange(points) + wobble(3.0)))
    mane = (150 + wobble(25), 82 + wobble(15), 30)
    return [Part(ring(x - 0.15 * r, y, 1.3 * r, outer, wobble(0.3)), mane)], [
        Part(ellipse(x + 0.8 * r, y + 0.25 * r, 0.25 * r, 0.2 * r, n=14), INK)
    ]


def _ram(x, y, r, wobble) -> tuple[Parts, Parts]:
    turn = np.linspace(0.2, 2 * np.pi * 1.35, 26)
    radius = r * (1.05 - 0.115 * turn)
    spiral = np.stack([x - 0.45 * r + radius * np.cos(turn - 2.1), y - 0.15 * r + radius * np.sin(turn - 2.1)], 1)
    return [], [
        Part(ellipse(x + 0.6 * r, y + 0.25 * r, 0.62 * r, 0.5 * r, 0.3), (92, 78, 74)),
        Part(stroke(spiral, 0.5 * r, 0.16 * r), HORN),
    ]


def _bear(x, y, r, wobble) -> tuple[Parts, Parts]:
    return _round_ears(x, y, r, 0.38), [
        Part(ellipse(x + 0.7 * r, y + 0.28 * r, 0.5 * r, 0.38 * r), CREAM),
        Part(ellipse(x + 1.0 * r, y + 0.15 * r, 0.2 * r, 0.15 * r, n=12), INK),
    ]


def _horse(x, y, r, wobble) -> tuple[Parts, Parts]:
    mane = Part(
        stroke(bezier((x, y - 1.1 * r), (x - 1.2 * r, y - 0.3 * r), (x - 1.6 * r, y + 1.3 * r)), 0.6 * r, 0.5 * r), INK
    )
    ears = [_triangle_ear(x, y, r, s, 0.1, 1.6, "coat") for s in (-0.3, 0.15)]
    face = Part(ellipse(x + 0.75 * r, y + 0.5 * r, 0.95 * r, 0.5 * r, 0.55), "coat")
    return [mane] + ears, [face, Part(ellipse(x + 1.35 * r, y + 0.9 * r, 0.34 * r, 0.3 * r, 0.5), GREY)]


def _pig(x, y, r, wobble) -> tuple[Parts, Parts]:
    ears = [_triangle_ear(x, y, r, s, 0.5, 1.3, "shade") for s in (-0.5, 0.2)]
    snout = Part(ellipse(x + 0.95 * r, y + 0.2 * r, 0.36 * r, 0.42 * r), (214, 120, 130))
    return ears, [snout] + [Part(ellipse(x + s * r, y + 0.2 * r, 0.08 * r, 0.12 * r, n=10), INK) for s in (0.87, 1.08)]


def _fox(x, y, r, wobble) -> tuple[Parts, Parts]:
    ears = [_triangle_ear(x, y, r, s, wobble(0.1), 1.8, "coat") for s in (-0.4, 0.4)]
    muzzle = np.array([x, y]) + r * np.array([[0.3, -0.35], [1.75, 0.25], [0.3, 0.75]])
    return ears, [Part(muzzle, CREAM), Part(ellipse(x + 1.7 * r, y + 0.22 * r, 0.18 * r, 0.16 * r, n=12), INK)]


def _cow(x, y, r, wobble) -> tuple[Parts, Parts]:
    horns = [
        Part(
            stroke(
                bezier((x + s * r, y - 0.6 * r), (x + 1.7 * s * r, y - 0.9 * r), (x + 1.5 * s * r, y - 1.6 * r)),
                0.28 * r,
                0.06 * r,
            ),
            IVORY,
        )
        for s in (-0.5, 0.5)
    ]
    ear = Part(ellipse(x - 0.95 * r, y - 0.2 * r, 0.5 * r, 0.25 * r, -0.3), "shade")
    return horns + [ear], [Part(ellipse(x + 0.7 * r, y + 0.4 * r, 0.55 * r, 0.5 * r), PINK)]


def _goat(x, y, r, wobble) -> tuple[Parts, Parts]:
    horns = [
        Part(
            stroke(
                bezier((x + s * r, y - 0.6 * r), (x + (s - 0.3) * r, y - 2.0 * r), (x + (s - 1.2) * r, y - 1.9 * r)),
                0.3 * r,
                0.08 * r,
            ),
            GREY,
        )
        for s in (-0.2, 0.3)
    ]
    beard = Part(np.array([x, y]) + r * np.array([[0.5, 0.7], [1.0, 0.6], [0.75, 1.7]]), CREAM)
    return horns, [Part(ellipse(x + 0.65 * r, y + 0.35 * r, 0.6 * r, 0.42 * r, 0.35), "coat"), beard]


def _mouse(x, y, r, wobble) -> tuple[Parts, Parts]:
    muzzle = np.array([x, y]) + r * np.array([[0.4, -0.5], [1.6, 0.3], [0.4, 0.75]])
    return _round_ears(x, y, r, 0.72), [
        Part(muzzle, "coat"),
        Part(ellipse(x + 1.55 * r, y + 0.3 * r, 0.16 * r, 0.14 * r, n=12), PINK),
    ]


def _frog(x, y, r, wobble) -> tuple[Parts, Parts]:
    bulges = [Part(ellipse(x + s * r, y - 0.85 * r, 0.36 * r, 0.36 * r, n=16), "coat") for s in (-0.1, 0.55)]
    balls = [Part(ellipse(x + s * r, y - 0.9 * r, 0.2 * r, 0.2 * r, n=12), (240, 214, 60)) for s in (-0.06, 0.6)]
    mouth = Part(
        stroke(
            bezier((x + 0.1 * r, y + 0.35 * r), (x + 0.7 * r, y + 0.6 * r), (x + 1.0 * r, y + 0.15 * r)),
            0.1 * r,
            0.1 * r,
        ),
        INK,
    )
    return bulges, balls + [mouth]


HEADS: dict[str, Callable] = {
    "cat": _cat, "deer": _deer, "duck": _duck, "elephant": _elephant, "giraffe": _giraffe, "lion": _lion,
    "rabbit": _rabbit, "ram": _ram, "bear": _bear, "horse": _horse, "pig": _pig, "fox": _fox, "cow": _cow,
    "goat": _goat, "mouse": _mouse, "frog": _frog,
}  # fmt: skip
"""Head of radius r at (x, y): the parts behind the skull and those in front of it."""


def _tail(kind: str, body: float, rng: np.random.Generator) -> Parts:
    if kind == "none":
        return []
    if kind == "stub":
        return [Part(ellipse(-1.05, -0.35 * body, 0.2, 0.13, 0.6, n=14), "coat")]
    if kind == "puff":
        return [Part(wavy(ellipse(-1.05, -0.1 * body, 0.24, 0.24), 7, 0.15), WHITE)]
    if kind == "fan":
        return [
            Part(np.array([[-0.75, -0.3], [-1.5, -0.62 - rng.uniform(0, 0.15)], [-1.35, -0.1], [-0.8, 0.2]]), "shade")
        ]
    if kind == "curl":
        t = np.linspace(0, 5.5, 16)
        return [
            Part(
                stroke(np.stack([-1.1 - 0.05 * t + 0.12 * np.cos(t), -0.3 * body + 0.12 * np.sin(t)], 1), 0.1, 0.05),
                "shade",
            )
        ]
    end = (-1.0 - rng.uniform(0.35, 0.7), rng.uniform(-0.8, 0.35))
    path = bezier((-0.88, -0.2 * body), (-1.35, rng.uniform(-0.5, 0.3)), end)
    if kind == "brush":
        return [Part(stroke(path, 0.2, 0.42), "coat"), Part(ellipse(*end, 0.24, 0.2), "second")]
    if kind == "tuft":
        return [Part(stroke(path, 0.14, 0.09), "coat"), Part(ellipse(*end, 0.17, 0.15, n=16), "second")]
    return [Part(stroke(path, 0.2 if kind == "long" else 0.1, 0.12 if kind == "long" else 0.05), "coat")]


def animal(species: Species, rng: np.random.Generator) -> tuple[Parts, tuple[float, float]]:
    """All parts from back to front, and where the head is."""
    near = lambda value, share=0.16: value * rng.uniform(1 - share, 1 + share)  # noqa: E731
    wobble = lambda size: rng.uniform(-size, size)  # noqa: E731
    b, t = near(species.body), np.linspace(0, 2 * np.pi, 36, endpoint=False)
    power = rng.uniform(0.78, 0.98)
    body = np.stack(
        [
            np.sign(np.cos(t)) * np.abs(np.cos(t)) ** power,
            b * np.sign(np.sin(t)) * np.abs(np.sin(t)) ** power + wobble(0.08) * np.cos(2 * t),
        ],
        1,
    )
    if species.outline == "wool":
        body = wavy(body, 15, 0.12)
    if species.outline == "spikes":
        body = spiky(body, 22, 0.22)
    length, width = near(species.legs[0]), near(species.legs[1])
    bird = species.head in BIRDS
    feet = (
        ((-0.1, "shade"), (0.18, "coat"))
        if bird
        else ((-0.62, "shade"), (0.45, "shade"), (-0.4, "coat"), (0.68, "coat"))
    )
    legs = []
    for x, fill in feet:
        end = (x + wobble(0.16), b + length)
        legs.append(Part(stroke([(x, 0.3 * b), end], width * 1.25, width), ORANGE if bird else fill))
        foot = ORANGE if bird else "second"
        legs.append(Part(ellipse(end[0] + 0.3 * width, end[1], 0.8 * width + 0.02, 0.45 * width + 0.02, n=12), foot))
    behind_body, before_body = (legs, []) if bird else (legs[:4], legs[4:])
    r = near(species.skull, 0.1)
    hx, hy = 0.8 + rng.uniform(0.08, 0.3), -0.5 * b - near(species.neck[0], 0.2)
    width = near(species.neck[1], 0.1)
    neck = Part(
        stroke(bezier((0.6, -0.05 * b), (0.72, hy + 0.3 * (0 - hy)), (hx - 0.04, hy)), 1.25 * width, 0.9 * width),
        "coat",
    )
    wing = [Part(ellipse(-0.2, -0.05, 0.62, 0.3 * b / 0.5, -0.15), "second")] if bird else []
    behind, front = HEADS[species.head](hx, hy, r, wobble)
    skull = [Part(ellipse(hx, hy, r, r * 0.92), "coat")]
    parts = behind_body + _tail(species.tail, b, rng) + [neck, Part(body, "coat")] + wing + before_body
    return parts + behind + skull + front + _eye(hx, hy, r), (hx, hy)
