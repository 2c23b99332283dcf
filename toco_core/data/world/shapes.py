"""Outlines of which the animals of the embedded world are cut: closed polygons, shape (n, 2), x right and y down.

The unit is half a body length; the body's centre is the origin and the head looks to the right.
"""

from typing import NamedTuple

import numpy as np

Points = np.ndarray
"""A closed polygon, shape (n, 2)."""

CREAM, ORANGE, BROWN, PINK, INK = (242, 230, 200), (240, 150, 40), (112, 72, 40), (234, 150, 156), (34, 28, 36)
WHITE, IVORY, HORN, GREY = (250, 250, 248), (236, 220, 180), (206, 178, 128), (120, 118, 124)


class Part(NamedTuple):
    """One piece of paper: its outline and what it is made of."""

    outline: Points
    fill: object
    """"coat", "shade" (the coat, darker), "second" (the coat's second colour) or an RGB colour."""


def ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, n: int = 26) -> Points:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    x, y = rx * np.cos(t), ry * np.sin(t)
    return np.stack([cx + x * np.cos(angle) - y * np.sin(angle), cy + x * np.sin(angle) + y * np.cos(angle)], 1)


def stroke(path: list[tuple[float, float]] | np.ndarray, width_from: float, width_to: float) -> Points:
    """The outline of a line that grows from one width to another."""
    p = np.asarray(path, float)
    tangent = np.gradient(p, axis=0)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    half = np.linspace(width_from, width_to, len(p))[:, None] / 2
    return np.concatenate([p + normal * half, (p - normal * half)[::-1]])


def bezier(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], n: int = 12) -> np.ndarray:
    t = np.linspace(0, 1, n)[:, None]
    return (1 - t) ** 2 * np.array(a) + 2 * t * (1 - t) * np.array(b) + t**2 * np.array(c)


def wavy(outline: Points, bumps: int, depth: float) -> Points:
    """The outline with `bumps` round bulges (wool), as deep as `depth` times the distance from its centre."""
    centre = outline.mean(0)
    n = 6 * bumps
    index = np.linspace(0, len(outline), n, endpoint=False)
    closed = np.concatenate([outline, outline[:1]])
    along = np.stack([np.interp(index, np.arange(len(closed)), closed[:, d]) for d in (0, 1)], 1)
    swell = 1 + depth * np.abs(np.sin(np.pi * bumps * np.arange(n) / n))
    return centre + (along - centre) * swell[:, None]


def spiky(outline: Points, spikes: int, depth: float) -> Points:
    """The outline with `spikes` points."""
    centre = outline.mean(0)
    index = np.linspace(0, len(outline), 2 * spikes, endpoint=False)
    closed = np.concatenate([outline, outline[:1]])
    along = np.stack([np.interp(index, np.arange(len(closed)), closed[:, d]) for d in (0, 1)], 1)
    return centre + (along - centre) * (1 + depth * (np.arange(2 * spikes) % 2))[:, None]


def ring(cx: float, cy: float, inner: float, outer: np.ndarray, turn: float = 0.0) -> Points:
    """A star whose points lie at `outer` (one radius each), its notches at `inner`."""
    n = 2 * len(outer)
    t = np.linspace(0, 2 * np.pi, n, endpoint=False) + turn
    radius = np.full(n, inner, float)
    radius[::2] = outer
    return np.stack([cx + radius * np.cos(t), cy + radius * np.sin(t)], 1)
