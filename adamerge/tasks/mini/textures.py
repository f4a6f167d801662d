"""Surface patterns, each a function of the plane: positive where there is ink."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from adamerge.tasks.mini.canvas import Canvas
from adamerge.tasks.mini.style import Style

_SIDE = 64
Field = NDArray[np.float64]  # (side, side)


def _bricks(x: Field, y: Field) -> Field:
    row = np.floor(y)
    return np.minimum(_edge(y), _edge((x + row % 2) / 2) * 2) - 0.12


def _honeycomb(x: Field, y: Field) -> Field:
    waves = [np.cos(2 * np.pi * (x * np.cos(a) + y * np.sin(a))) for a in np.pi * np.array([0, 1, 2]) / 3]
    return sum(waves, np.zeros_like(x)) + 0.7


def _scales(x: Field, y: Field) -> Field:
    row = np.floor(y)
    across = (x + row % 2 / 2) % 1 - 0.5
    return np.abs(np.hypot(2 * across, y % 1) - 0.85) - 0.2


def _edge(t: Field) -> Field:
    """Distance to the next whole number."""
    return np.abs(t - np.rint(t))


PATTERNS: dict[str, Callable[[Field, Field], Field]] = {
    "horizontal stripes": lambda x, y: np.sin(2 * np.pi * y),
    "vertical stripes": lambda x, y: np.sin(2 * np.pi * x),
    "diagonal stripes": lambda x, y: np.sin(np.sqrt(2) * np.pi * (x + y)),
    "a checkerboard": lambda x, y: np.sin(np.pi * x) * np.sin(np.pi * y),
    "polka dots": lambda x, y: 0.32 - np.hypot(x % 1 - 0.5, y % 1 - 0.5),
    "a grid": lambda x, y: 0.14 - np.minimum(_edge(x), _edge(y)),
    "waves": lambda x, y: np.sin(2 * np.pi * (y + 0.3 * np.sin(2 * np.pi * x / 1.7))),
    "zigzags": lambda x, y: np.sin(2 * np.pi * (y + 1.4 * _edge(x / 1.7))),
    "bricks": _bricks,
    "a honeycomb": _honeycomb,
    "fish scales": _scales,
    "concentric rings": lambda x, y: np.sin(2 * np.pi * np.hypot(x, y)),
    "radial rays": lambda x, y: np.sin(8 * np.arctan2(y, x)),
    "speckles": lambda x, y: np.zeros_like(x),
}
TEXTURES = tuple(PATTERNS)


def draw_texture(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A pattern over the whole picture; variety changes its scale, its place and its crispness."""
    free = style.variety
    repeats = 1.5 * 2 ** (free * rng.uniform(-0.3, 0.3))
    axis = np.linspace(-1.5, 1.5, _SIDE)  # the mask is larger than the picture, so that a tilt shows no rim
    x, y = np.meshgrid(axis, axis)
    middle = free * rng.uniform(-0.15, 0.15, 2)
    x, y = x + middle[0], y + middle[1]
    name = TEXTURES[label]
    if name == "speckles":
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8))
        field = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), dtype=float) / 128 - 1
    else:
        field = PATTERNS[name](x * repeats, y * repeats)
    sharpness = 8 * (1 - 0.6 * free * rng.uniform())
    mask = 255 / (1 + np.exp(-sharpness * field / (np.abs(field).mean() + 1e-6)))
    canvas.stamp(Image.fromarray(mask.astype(np.uint8)), reach=1.5)
