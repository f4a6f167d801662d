"""Geometric shapes, as outlines or filled."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from adamerge.tasks.mini.canvas import Canvas, circle, rectangle, regular
from adamerge.tasks.mini.style import Style, shade


def _star() -> NDArray[np.float64]:
    outer, inner = regular(5, 0.85), regular(5, 0.36, -54)
    return np.stack([outer, inner], 1).reshape(-1, 2)


def _cross() -> NDArray[np.float64]:
    a, b = 0.26, 0.78
    quarter = np.array([[-a, -b], [a, -b], [a, -a]])
    turn = np.array([[0, 1], [-1, 0]])  # a quarter turn of row vectors, clockwise on screen
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * np.pi, 32)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], 1) / 21


def _crescent() -> NDArray[np.float64]:
    return np.concatenate([circle((0, 0), 0.8, (50, 310)), circle((0.3, 0), (0.45, 0.6), (270, 90))])


def _drop() -> NDArray[np.float64]:
    return np.concatenate([circle((0, 0.25), 0.55, (-25, 205)), [[0, -0.85]]])


OUTLINES = {
    "circle": circle((0, 0), 0.75),
    "square": rectangle(-0.66, -0.66, 0.66, 0.66),
    "triangle": regular(3, 0.85) + np.array([0, 0.15]),
    "pentagon": regular(5, 0.8),
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
    "crescent": _crescent(),
    "diamond": np.array([[0, -0.85], [0.55, 0], [0, 0.85], [-0.55, 0]]),
    "rectangle": rectangle(-0.8, -0.42, 0.8, 0.42),
    "semicircle": circle((0, 0.35), 0.8, (180, 360)),
    "drop": _drop(),
    "arrow": np.array([[-0.8, -0.2], [0.1, -0.2], [0.1, -0.6], [0.8, 0], [0.1, 0.6], [0.1, 0.2], [-0.8, 0.2]]),
    "lightning": np.array([[0.2, -0.85], [-0.5, 0.12], [-0.05, 0.12], [-0.25, 0.85], [0.5, -0.2], [0.05, -0.2]]),
}
SHAPES = tuple(OUTLINES)


def draw_shape(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A filled shape; with variety it is smaller, off centre, hatched or only an outline."""
    free = style.variety
    size = 1 - free * rng.uniform(0, 0.35)
    points = size * OUTLINES[SHAPES[label]] + (1 - size) * rng.uniform(-0.5, 0.5, 2)
    if rng.uniform() < free / 2:
        canvas.line(np.concatenate([points, points[:2]]), rng.uniform(0.11, 0.18))
        return
    canvas.polygon(points)
    if rng.uniform() < free / 2:
        canvas.line(np.concatenate([points, points[:2]]), 0.1, shade(rng))
