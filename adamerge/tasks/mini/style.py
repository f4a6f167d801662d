"""How a picture is taken: the same drawing as a clean catalogue print or as seen in the field."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from adamerge.tasks.mini.canvas import SIZE, Canvas, Colour, Pose


@dataclass(frozen=True)
class Style:
    """Strength of everything that happens between the thing itself and its picture; 0 is a clean print."""

    tilt: float = 0.0  # degrees, standard deviation of the rotation
    shift: float = 0.0  # largest offset, in units of half the side
    zoom: float = 0.0  # largest relative change of either axis
    colour: float = 0.0  # 0: dark ink on light paper; 1: any two colours that can be told apart
    variety: float = 0.0  # how far the drawing departs from its standard form, 0..1
    clutter: float = 0.0  # mean number of stray marks over the drawing
    blur: float = 0.0  # how much of every pixel comes from its neighbours, 0..1
    noise: float = 0.0  # standard deviation per channel, of 255

    def toward(self, other: Style, amount: float) -> Style:
        """The style that lies ``amount`` (0..1) of the way to ``other``."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Style(*(mine + amount * (theirs - mine) for mine, theirs in pairs))


CATALOGUE = Style(tilt=1.0, shift=0.05, zoom=0.05, colour=0.1, variety=0.1, noise=2.0)

Draw = Callable[[Canvas, int, Generator, Style], None]


def render(draw: Draw, label: int, rng: Generator, style: Style) -> NDArray[np.uint8]:
    """One picture of class ``label``, (SIZE, SIZE, 3); a pure function of the generator's state."""
    paper, ink = _colours(rng, style.colour)
    pose = Pose.of(
        np.radians(style.tilt) * np.clip(rng.normal(), -2, 2),
        tuple(1 + style.zoom * rng.uniform(-1, 1, 2)),
        tuple(style.shift * rng.uniform(-1, 1, 2)),
    )
    canvas = Canvas(paper, ink, pose)
    draw(canvas, label, rng, style)
    for _ in range(rng.poisson(style.clutter)):
        canvas.line(rng.uniform(-1, 1, (2, 2)), rng.uniform(0.03, 0.12), shade(rng))
    pixels = _blur(canvas.pixels(), style.blur * rng.uniform())
    pixels = pixels + style.noise * rng.uniform(0.5, 1.5) * rng.normal(size=(SIZE, SIZE, 3))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """An RGB colour from numbers between 0 and 1 (the hue wraps around)."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(red * 255), round(green * 255), round(blue * 255)


def shade(rng: Generator) -> Colour:
    """Any colour."""
    return hsv(rng.uniform(), rng.uniform(), rng.uniform())


def vary(rng: Generator, colour: Colour, amount: float) -> Colour:
    """``colour`` moved by up to ``amount`` (0..1) of the whole range in every channel."""
    moved = np.asarray(colour) + 255 * amount * rng.uniform(-1, 1, 3)
    red, green, blue = np.clip(np.rint(moved), 0, 255).astype(int).tolist()
    return red, green, blue


def _colours(rng: Generator, amount: float) -> tuple[Colour, Colour]:
    """Paper and ink whose brightness differs clearly at every ``amount``."""
    light = hsv(rng.uniform(), amount * rng.uniform(0, 0.8), 1 - amount * rng.uniform(0, 0.25))
    dark = hsv(rng.uniform(), amount * rng.uniform(0, 1), 0.1 + amount * rng.uniform(-0.1, 0.25))
    return (dark, light) if rng.uniform() < amount / 2 else (light, dark)


def _blur(pixels: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """Mix every pixel with the mean of its 3 × 3 neighbourhood."""
    if amount <= 0:
        return pixels
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    mean = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return pixels + amount * (mean - pixels)
