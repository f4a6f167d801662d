"""Land use as seen from the air."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from adamerge.tasks.mini.canvas import Canvas, Colour, circle, rectangle
from adamerge.tasks.mini.style import Style, vary

GRASS, WOOD, SAND, WATER = (120, 160, 80), (40, 85, 40), (215, 190, 135), (45, 100, 160)
ASPHALT, ROOF, WHITE, SOIL = (110, 110, 115), (165, 80, 60), (240, 240, 240), (150, 115, 75)


class Ground:
    """The colours of one flight: a season and a light that every surface shares."""

    def __init__(self, rng: Generator, free: float) -> None:
        self.rng, self.free = rng, free
        self._tint = 1 + free * rng.uniform(-0.25, 0.15, 3)

    def of(self, colour: Colour, amount: float = 0.06) -> Colour:
        red, green, blue = np.clip(np.asarray(colour) * self._tint, 0, 255).astype(int).tolist()
        return vary(self.rng, (red, green, blue), amount * (0.3 + self.free))

    def spots(self, count: int, reach: float = 1.0) -> list[list[float]]:
        """Random places, each an (x, y)."""
        return self.rng.uniform(-reach, reach, (count, 2)).tolist()

    def bend(self) -> np.ndarray:
        """A winding way from the left rim to the right one, (n, 2)."""
        x = np.linspace(-1.6, 1.6, 12)
        amplitude, start = 0.15 + 0.3 * self.rng.uniform(), self.rng.uniform(0, 6)
        return np.stack([x, amplitude * np.sin(2.5 * x + start)], 1)


def _forest(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(WOOD))
    for spot in ground.spots(45, 1.2):
        canvas.disc(spot, ground.rng.uniform(0.1, 0.22), ground.of((55, 110, 50), 0.14))


def _farmland(canvas: Canvas, ground: Ground) -> None:
    cuts = ground.rng.uniform(-0.4, 0.4, 2)
    for left, right in ((-1.5, cuts[0]), (cuts[0], 1.5)):
        for top, bottom in ((-1.5, cuts[1]), (cuts[1], 1.5)):
            crop = (GRASS, SOIL, SAND, (90, 140, 60))[ground.rng.integers(4)]
            canvas.polygon(rectangle(left, top, right, bottom), ground.of(crop, 0.12))
            for x in np.arange(left, right, 0.22):
                canvas.line([(x, top), (x, bottom)], 0.05, ground.of(SOIL, 0.1))


def _river(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(GRASS))
    for spot in ground.spots(8):
        canvas.disc(spot, 0.16, ground.of(WOOD, 0.1))
    canvas.line(ground.bend(), ground.rng.uniform(0.35, 0.55), ground.of(WATER))


def _beach(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(SAND))
    shore = ground.bend() * [1, 0.4]
    canvas.polygon([*shore, (2, 2), (-2, 2)], ground.of(WATER))
    canvas.line(shore, 0.12, ground.of(WHITE))


def _lake(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(GRASS))
    for spot in ground.spots(8):
        canvas.disc(spot, 0.16, ground.of(WOOD, 0.1))
    canvas.disc(ground.spots(1, 0.2)[0], tuple(ground.rng.uniform(0.45, 0.7, 2)), ground.of(WATER))


def _houses(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(GRASS))
    canvas.line([(-1.5, 0), (1.5, 0)], 0.2, ground.of(ASPHALT))
    for x in np.arange(-1.2, 1.3, 0.48):
        for y in (-0.8, -0.36, 0.36, 0.8):
            half = ground.rng.uniform(0.12, 0.18)
            canvas.polygon(rectangle(x - half, y - half, x + half, y + half), ground.of(ROOF, 0.14))


def _highway(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(GRASS))
    canvas.polygon(rectangle(-1.6, -0.45, 1.6, 0.45), ground.of(ASPHALT))
    canvas.line([(-1.6, 0), (1.6, 0)], 0.12, ground.of(GRASS))
    for x, y in ground.spots(6):
        lane = 0.24 if y > 0 else -0.24
        canvas.polygon(rectangle(x - 0.11, lane - 0.07, x + 0.11, lane + 0.07), ground.of(WHITE, 0.4))


def _parking(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(ASPHALT))
    for y in (-0.75, -0.25, 0.25, 0.75):
        for x in np.arange(-1.25, 1.3, 0.25):
            if ground.rng.uniform() < 0.75:
                car = rectangle(x - 0.08, y - 0.15, x + 0.08, y + 0.15)
                canvas.polygon(car, ground.of((150, 150, 150), 0.6))


def _runway(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(GRASS))
    canvas.polygon(rectangle(-1.6, -0.32, 1.6, 0.32), ground.of((80, 80, 85)))
    for x in np.arange(-1.3, 1.4, 0.4) + 0.2 * ground.rng.uniform():
        canvas.line([(x, 0), (x + 0.2, 0)], 0.09, ground.of(WHITE))


def _desert(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(SAND))
    for y in np.arange(-1.3, 1.4, 0.4):
        canvas.line(ground.bend() * [1, 0.4] + [0, y], 0.08, ground.of((190, 160, 105)))


def _stadium(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(ASPHALT, 0.1))
    for size, colour in ((0.85, WHITE), (0.68, ROOF), (0.5, GRASS)):
        canvas.disc((0, 0), (size, 0.72 * size), ground.of(colour))


def _harbour(canvas: Canvas, ground: Ground) -> None:
    canvas.polygon(_ALL, ground.of(WATER))
    canvas.polygon(rectangle(-1.6, -1.6, 1.6, -0.65), ground.of(ASPHALT))
    for x in (-0.7, 0.0, 0.7):
        canvas.line([(x, -0.8), (x, 0.9)], 0.09, ground.of(SOIL))
        for y in (-0.4, 0.0, 0.4, 0.8):
            if ground.rng.uniform() < 0.8:
                canvas.polygon(circle((x + 0.2, y), (0.14, 0.08)), ground.of(WHITE))


_ALL = rectangle(-3, -3, 3, 3)
SCENES: dict[str, Callable[[Canvas, Ground], None]] = {
    "forest": _forest,
    "farmland": _farmland,
    "a river": _river,
    "a beach": _beach,
    "a lake": _lake,
    "houses": _houses,
    "a highway": _highway,
    "a parking lot": _parking,
    "a runway": _runway,
    "desert": _desert,
    "a stadium": _stadium,
    "a harbour": _harbour,
}
LAND = tuple(SCENES)


def draw_land(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A scene from straight above; with variety turned, in other seasons, light and scale."""
    free = style.variety
    turns = free * rng.uniform(-0.4, 0.4)
    canvas.turn(turns, 1 + 0.25 * free * rng.uniform(-1, 1))
    SCENES[LAND[label]](canvas, Ground(rng, free))
