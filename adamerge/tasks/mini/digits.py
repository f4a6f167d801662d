"""Handwritten digits: the scans that ship with scikit-learn, 8 × 8 grey values each.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
from numpy.random import Generator
from PIL import Image

from adamerge.tasks.mini.canvas import Canvas
from adamerge.tasks.mini.style import Draw, Style

DIGITS = tuple(str(digit) for digit in range(10))
_NUM_TEST_SCANS = 600


def draw_scan(test: bool) -> Draw:
    """Draws scans of one half of the data; no scan is in both halves."""
    return partial(_draw, test)


def _draw(test: bool, canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    choice = scans(test)[label]
    canvas.stamp(choice[rng.integers(len(choice))])


@cache
def scans(test: bool) -> tuple[tuple[Image.Image, ...], ...]:
    """Masks by digit."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[:_NUM_TEST_SCANS] if test else order[_NUM_TEST_SCANS:]
    return tuple(
        tuple(_mask(images[index].reshape(8, 8)) for index in chosen if labels[index] == digit) for digit in range(10)
    )


def _mask(scan: np.ndarray) -> Image.Image:
    grey = Image.fromarray(np.minimum(scan * 16, 255).astype(np.uint8))
    return grey.resize((64, 64), Image.Resampling.BICUBIC)
