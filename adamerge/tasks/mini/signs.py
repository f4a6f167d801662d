"""Traffic-like signs: a board, a border and a symbol."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from adamerge.tasks.mini.canvas import Canvas, Colour, circle, rectangle, regular
from adamerge.tasks.mini.letters import glyph
from adamerge.tasks.mini.style import Style, hsv, vary

RED, BLUE, YELLOW = (200, 25, 35), (25, 75, 180), (245, 200, 30)
WHITE, BLACK = (245, 245, 245), (20, 20, 20)
_DOWN = regular(3, 0.95, 90) - np.array([0, 0.12])
_UP = regular(3, 0.95) + np.array([0, 0.15])
_ARROW = np.array([[-0.1, 0.5], [-0.1, 0], [-0.3, 0], [0, -0.5], [0.3, 0], [0.1, 0], [0.1, 0.5]])

Paint = Callable[[Colour], Colour]


def _stop(canvas: Canvas, paint: Paint) -> None:
    canvas.polygon(regular(8, 0.9, 22.5), paint(RED))
    canvas.polygon(rectangle(-0.6, -0.2, 0.6, 0.2), paint(WHITE))


def _yield(canvas: Canvas, paint: Paint) -> None:
    canvas.polygon(_DOWN, paint(RED))
    canvas.polygon(0.55 * _DOWN, paint(WHITE))


def _no_entry(canvas: Canvas, paint: Paint) -> None:
    canvas.disc((0, 0), 0.85, paint(RED))
    canvas.polygon(rectangle(-0.6, -0.17, 0.6, 0.17), paint(WHITE))


def _priority(canvas: Canvas, paint: Paint) -> None:
    canvas.polygon(regular(4, 0.95), paint(WHITE))
    canvas.polygon(regular(4, 0.7), paint(YELLOW))


def _ring(canvas: Canvas, paint: Paint) -> None:
    canvas.disc((0, 0), 0.88, paint(RED))
    canvas.disc((0, 0), 0.64, paint(WHITE))


def _speed(limit: str) -> Callable[[Canvas, Paint], None]:
    def draw(canvas: Canvas, paint: Paint) -> None:
        _ring(canvas, paint)
        canvas.stamp(glyph("DejaVuSans-Bold", limit), paint(BLACK), reach=0.62)

    return draw


def _no_overtaking(canvas: Canvas, paint: Paint) -> None:
    _ring(canvas, paint)
    canvas.polygon(rectangle(-0.45, -0.15, -0.08, 0.22), paint(RED))
    canvas.polygon(rectangle(0.08, -0.15, 0.45, 0.22), paint(BLACK))


def _end(canvas: Canvas, paint: Paint) -> None:
    canvas.disc((0, 0), 0.85, paint(WHITE))
    for offset in (-0.2, 0, 0.2):
        canvas.line([(-0.5 + offset, 0.55), (0.5 + offset, -0.55)], 0.09, paint(BLACK))


def _arrow(degrees: float) -> Callable[[Canvas, Paint], None]:
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def draw(canvas: Canvas, paint: Paint) -> None:
        canvas.disc((0, 0), 0.88, paint(BLUE))
        canvas.polygon(1.2 * _ARROW @ turn, paint(WHITE))

    return draw


def _roundabout(canvas: Canvas, paint: Paint) -> None:
    canvas.disc((0, 0), 0.88, paint(BLUE))
    white = paint(WHITE)
    for start in (0, 120, 240):
        canvas.arc((0, 0), 0.45, (start, start + 70), 0.16, white)
        canvas.polygon(0.22 * regular(3, 1, start) + circle((0, 0), 0.45, (start + 85, 360))[0], white)


def _no_parking(canvas: Canvas, paint: Paint) -> None:
    canvas.disc((0, 0), 0.88, paint(RED))
    canvas.disc((0, 0), 0.66, paint(BLUE))
    canvas.line([(-0.5, -0.5), (0.5, 0.5)], 0.2, paint(RED))


def _parking(canvas: Canvas, paint: Paint) -> None:
    canvas.polygon(rectangle(-0.8, -0.8, 0.8, 0.8), paint(BLUE))
    canvas.stamp(glyph("DejaVuSans-Bold", "P"), paint(WHITE), reach=0.65)


def _dead_end(canvas: Canvas, paint: Paint) -> None:
    canvas.polygon(rectangle(-0.8, -0.8, 0.8, 0.8), paint(BLUE))
    canvas.polygon(rectangle(-0.12, -0.3, 0.12, 0.75), paint(WHITE))
    canvas.polygon(rectangle(-0.45, -0.55, 0.45, -0.25), paint(RED))


def _warning(canvas: Canvas, paint: Paint) -> None:
    canvas.polygon(_UP, paint(RED))
    canvas.polygon(0.66 * _UP + [0, 0.06], paint(WHITE))


def _danger(canvas: Canvas, paint: Paint) -> None:
    _warning(canvas, paint)
    canvas.polygon(rectangle(-0.08, -0.2, 0.08, 0.2), paint(BLACK))
    canvas.disc((0, 0.36), 0.09, paint(BLACK))


def _lights(canvas: Canvas, paint: Paint) -> None:
    _warning(canvas, paint)
    for height, colour in ((-0.16, RED), (0.1, YELLOW), (0.36, (20, 150, 60))):
        canvas.disc((0, height), 0.13, paint(colour))


def _crossroads(canvas: Canvas, paint: Paint) -> None:
    _warning(canvas, paint)
    canvas.line([(-0.26, -0.1), (0.26, 0.42)], 0.14, paint(BLACK))
    canvas.line([(0.26, -0.1), (-0.26, 0.42)], 0.14, paint(BLACK))


def _bump(canvas: Canvas, paint: Paint) -> None:
    _warning(canvas, paint)
    canvas.polygon(circle((0, 0.42), (0.36, 0.34), (180, 360)), paint(BLACK))


BOARDS: dict[str, Callable[[Canvas, Paint], None]] = {
    "stop": _stop,
    "give way": _yield,
    "no entry": _no_entry,
    "priority road": _priority,
    "speed limit 30": _speed("30"),
    "speed limit 50": _speed("50"),
    "speed limit 80": _speed("80"),
    "no vehicles": _ring,
    "no overtaking": _no_overtaking,
    "end of limits": _end,
    "ahead only": _arrow(0),
    "turn right": _arrow(90),
    "turn left": _arrow(-90),
    "keep right": _arrow(135),
    "roundabout": _roundabout,
    "no parking": _no_parking,
    "parking": _parking,
    "dead end": _dead_end,
    "danger": _danger,
    "traffic lights": _lights,
    "crossroads": _crossroads,
    "bumpy road": _bump,
}
SIGNS = tuple(BOARDS)


def draw_sign(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A sign before a wall, a street or the sky; with variety it stands in bad light and has faded."""
    free = style.variety
    canvas.polygon(rectangle(-3, rng.uniform(-0.5, 2), 3, 3), vary(rng, canvas.paper, 0.4 * free))
    light = 1 - free * rng.uniform(0, 0.5)
    haze = free * rng.uniform(0, 0.35)
    veil = np.asarray(hsv(rng.uniform(), 0.2, 0.8))

    def paint(colour: Colour) -> Colour:
        red, green, blue = (light * ((1 - haze) * np.asarray(colour) + haze * veil)).astype(int).tolist()
        return vary(rng, (red, green, blue), 0.05 * free)

    BOARDS[SIGNS[label]](canvas, paint)
