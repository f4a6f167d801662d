"""A small picture to draw on: unit coordinates, a pose, and oversampling for smooth edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

SIZE = 32  # pixels, side of a finished picture
OVERSAMPLING = 3

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Pose:
    """Where the drawn thing sits: p ↦ linear · p + shift, in units of half the picture's side."""

    linear: NDArray[np.float64]  # (2, 2)
    shift: NDArray[np.float64]  # (2,)

    @classmethod
    def of(cls, angle: float, zoom: tuple[float, float], shift: tuple[float, float]) -> Pose:
        """A rotation by ``angle`` radians (clockwise on screen) after zooming both axes."""
        cos, sin = np.cos(angle), np.sin(angle)
        return cls(np.array([[cos, -sin], [sin, cos]]) * np.asarray(zoom), np.asarray(shift, dtype=float))


class Canvas:
    """Draws in coordinates from -1 to 1, x to the right and y downward; the pose moves everything drawn.

    Args:
        paper: Colour of the empty picture.
        ink: The colour that a drawing uses when it has no reason for another.
        pose: Applied to every point that is drawn.
    """

    def __init__(self, paper: Colour, ink: Colour, pose: Pose) -> None:
        self.paper, self.ink, self.pose = paper, ink, pose
        self._side = SIZE * OVERSAMPLING
        self._image = Image.new("RGB", (self._side, self._side), paper)
        self._pen = ImageDraw.Draw(self._image)

    def turn(self, angle: float, zoom: float) -> None:
        """Turn (radians) and zoom what is drawn from now on about the origin of the present pose."""
        inner = Pose.of(angle, (zoom, zoom), (0, 0))
        self.pose = Pose(self.pose.linear @ inner.linear, self.pose.shift)

    def _place(self, points: ArrayLike) -> list[tuple[float, float]]:
        moved = np.asarray(points, dtype=float).reshape(-1, 2) @ self.pose.linear.T + self.pose.shift
        return [(x, y) for x, y in ((moved + 1) * self._side / 2).tolist()]

    def polygon(self, points: ArrayLike, fill: Colour | None = None) -> None:
        """A filled polygon through ``points``, (n, 2)."""
        self._pen.polygon(self._place(points), fill=fill or self.ink)

    def line(self, points: ArrayLike, width: float, fill: Colour | None = None) -> None:
        """An open polyline through ``points``, (n, 2); ``width`` in units of half the side."""
        zoom = float(np.sqrt(abs(np.linalg.det(self.pose.linear))))
        pixels = max(1, round(width * zoom * self._side / 2))
        self._pen.line(self._place(points), fill=fill or self.ink, width=pixels, joint="curve")

    def disc(
        self,
        centre: Sequence[float],
        radius: float | tuple[float, float],
        fill: Colour | None = None,
    ) -> None:
        """A filled circle, or an ellipse where ``radius`` has two numbers."""
        self.polygon(circle(centre, radius), fill)

    def arc(
        self,
        centre: Sequence[float],
        radius: float | tuple[float, float],
        degrees: tuple[float, float],
        width: float,
        fill: Colour | None = None,
    ) -> None:
        """Part of a circle's outline; 0 degrees points right, 90 downward."""
        self.line(circle(centre, radius, degrees), width, fill)

    def stamp(self, mask: Image.Image, fill: Colour | None = None, reach: float = 1.0) -> None:
        """Paint through a grey ``mask`` that covers the square from -``reach`` to ``reach``."""
        step = np.asarray(mask.size) / 2
        inverse = np.linalg.inv(self.pose.linear) / reach
        # output pixel q ↦ mask pixel: ((2q/side - 1 - shift) @ inverseᵀ + 1) · step
        matrix = inverse * step[:, None] * 2 / self._side
        offset = (inverse @ (-1 - self.pose.shift) + 1) * step
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        placed = mask.transform(self._image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        self._image.paste(fill or self.ink, mask=placed)

    def pixels(self) -> NDArray[np.float64]:
        """The picture so far, averaged down, (SIZE, SIZE, 3) in 0..255."""
        return np.asarray(self._image.reduce(OVERSAMPLING), dtype=float)


def circle(
    centre: Sequence[float], radius: float | tuple[float, float], degrees: tuple[float, float] = (0, 360)
) -> NDArray[np.float64]:
    """Points on an ellipse from one angle to another, (n, 2)."""
    angles = np.radians(np.linspace(*degrees, 24))
    return np.asarray(centre) + np.broadcast_to(radius, 2) * np.stack([np.cos(angles), np.sin(angles)], 1)


def regular(corners: int, radius: float, start: float = -90) -> NDArray[np.float64]:
    """Corners of a regular polygon about the origin, the first at ``start`` degrees, (corners, 2)."""
    angles = np.radians(start + 360 / corners * np.arange(corners))
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def rectangle(left: float, top: float, right: float, bottom: float) -> NDArray[np.float64]:
    """Corners of an upright rectangle, (4, 2)."""
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
