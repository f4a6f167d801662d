"""Analog clocks to be read to the hour."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from adamerge.tasks.mini.canvas import Canvas
from adamerge.tasks.mini.style import Style, vary

HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


def draw_clock(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A clock at a full hour; with variety a few minutes off it, with other hands, ticks and rims."""
    free = style.variety
    face = vary(rng, canvas.paper, 0.25 * free)
    canvas.disc((0, 0), 0.95)
    canvas.disc((0, 0), 0.95 - rng.uniform(0.04, 0.08 + 0.12 * free), face)
    if rng.uniform() > free / 2:
        for tick in range(0, 12, 3 if rng.uniform() < free else 1):
            canvas.line([_hand(tick, 0.72), _hand(tick, 0.82)], 0.05)
    minutes = free * rng.uniform(-6, 6)
    thick = rng.uniform(0.14, 0.14 + 0.1 * free)
    hour = vary(rng, canvas.ink, 0.2 * free)
    canvas.line([_hand(label + 6, 0.1 * free), _hand(label + minutes / 60, 0.5)], thick, hour)
    canvas.line([(0, 0), _hand(minutes / 5, 0.75)], rng.uniform(0.06, 0.09))
    if rng.uniform() < free:
        canvas.line([(0, 0), _hand(rng.uniform(0, 12), 0.7)], 0.03, vary(rng, (200, 30, 30), 0.2))


def _hand(hour: float, length: float) -> tuple[float, float]:
    angle = np.pi / 6 * hour
    return length * float(np.sin(angle)), -length * float(np.cos(angle))
