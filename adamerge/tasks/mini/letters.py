"""Glyphs from matplotlib's bundled fonts: the letters task and printed digits."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from adamerge.tasks.mini.canvas import Canvas
from adamerge.tasks.mini.style import Style

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

PLAIN_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono")
FANCY_FONTS = (
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "cmb10",
    "cmti10",
)
_SIDE = 64  # pixels of a glyph mask


def draw_letter(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A capital letter; the more variety, the more often in a serif, slanted or typewriter face."""
    canvas.stamp(glyph(_font(rng, style), LETTERS[label]))


def draw_printed_digit(canvas: Canvas, label: int, rng: Generator, style: Style) -> None:
    """A printed digit."""
    canvas.stamp(glyph(_font(rng, style), str(label)))


def _font(rng: Generator, style: Style) -> str:
    fonts = FANCY_FONTS if rng.uniform() < style.variety else PLAIN_FONTS
    return fonts[rng.integers(len(fonts))]


@cache
def glyph(font: str, text: str) -> Image.Image:
    """The text as a grey mask that fills nine tenths of a square."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    face = ImageFont.truetype(path, _SIDE)
    left, top, right, bottom = face.getbbox(text)
    ink = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(ink).text((-left, -top), text, fill=255, font=face)
    scale = 0.9 * _SIDE / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))))
    mask = Image.new("L", (_SIDE, _SIDE))
    mask.paste(ink, ((_SIDE - ink.width) // 2, (_SIDE - ink.height) // 2))
    return mask
