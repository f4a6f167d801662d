"""Facial expressions, told from brows, eyes and mouth."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.random import Generator

from adamerge.tasks.mini.canvas import Canvas, circle
from adamerge.tasks.mini.style import Style, hsv, vary


@dataclass(frozen=True)
class Expression:
    """What a face does: kinds of eyes and mouth, and the brows' slope (outer end lower is positive)."""

    mouth: str
    left_eye: str = "open"
    right_eye: str = "open"
    brows: float | None = None
    tears: bool = False


EXPRESSIONS = {
    "happy": Expression("smile"),
    "sad": Expression("frown", brows=0.15),
    "angry": Expression("frown", brows=-0.22),
    "surprised": Expression("round", "wide", "wide"),
    "neutral": Expression("flat"),
    "winking": Expression("smile", right_eye="shut"),
    "sleeping": Expression("flat", "shut", "shut"),
    "laughing": Expression("grin", "shut", "shut"),
    "crying": Expression("frown", tears=True),
    "grinning": Expression("grin"),
}
FACES = tuple(EXPRESSIONS)


def draw_face(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A round face; with variety its skin, build, hair and features differ from person to person."""
    free = style.variety
    expression = EXPRESSIONS[FACES[label]]
    skin = hsv(0.13 - free * rng.uniform(0, 0.12), 0.7 - free * rng.uniform(0, 0.4), 1 - free * rng.uniform(0, 0.5))
    dark = vary(rng, (30, 20, 15), 0.1 * free)
    width = 0.9 - free * rng.uniform(0, 0.2)
    if rng.uniform() < free:
        canvas.polygon(
            circle((0, -0.15), (width + 0.08, 0.85), (170, 370)), hsv(rng.uniform(0, 0.12), 0.6, rng.uniform(0.1, 0.7))
        )
    canvas.disc((0, 0.05), (width, 0.88), skin)

    apart, high = 0.36 + free * rng.uniform(-0.06, 0.06), -0.15 + free * rng.uniform(-0.08, 0.08)
    size = 0.11 + free * rng.uniform(-0.02, 0.03)
    for side, eye in ((-1, expression.left_eye), (1, expression.right_eye)):
        _eye(canvas, (side * apart, high), eye, size, dark)
        if expression.brows is not None:
            inner, outer = -expression.brows, expression.brows
            ends = [(side * (apart - 0.2), high - 0.27 + inner), (side * (apart + 0.2), high - 0.27 + outer)]
            canvas.line(ends, 0.1, dark)
        if expression.tears:
            canvas.polygon(circle((side * apart, high + 0.4), (0.09, 0.22)), (70, 150, 240))
    _mouth(canvas, expression.mouth, 0.42 + free * rng.uniform(-0.06, 0.06), 0.4 + free * rng.uniform(-0.1, 0.08), dark)


def _eye(canvas: Canvas, at: tuple[float, float], kind: str, size: float, dark: tuple[int, int, int]) -> None:
    if kind == "shut":
        canvas.arc(at, (0.17, 0.1), (0, 180), 0.08, dark)
        return
    if kind == "wide":
        canvas.disc(at, 2.1 * size, (250, 250, 250))
    canvas.disc(at, size, dark)


def _mouth(canvas: Canvas, kind: str, height: float, half: float, dark: tuple[int, int, int]) -> None:
    if kind == "smile":
        canvas.arc((0, height - 0.1), (half, 0.26), (10, 170), 0.09, dark)
    elif kind == "frown":
        canvas.arc((0, height + 0.2), (half, 0.26), (190, 350), 0.09, dark)
    elif kind == "flat":
        canvas.line([(-half, height), (half, height)], 0.09, dark)
    elif kind == "round":
        canvas.disc((0, height), (0.17, 0.22), dark)
    else:
        canvas.polygon(circle((0, height - 0.12), (half + 0.08, 0.4), (0, 180)), dark)
        canvas.polygon(circle((0, height - 0.12), (half, 0.14), (0, 180)), (250, 250, 250))
