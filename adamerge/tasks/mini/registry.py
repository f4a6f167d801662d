"""The eight tasks by name, and how to render any number of their images."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from adamerge.tasks.mini.canvas import SIZE
from adamerge.tasks.mini.clocks import HOURS, draw_clock
from adamerge.tasks.mini.digits import DIGITS, draw_scan
from adamerge.tasks.mini.faces import FACES, draw_face
from adamerge.tasks.mini.land import LAND, draw_land
from adamerge.tasks.mini.letters import LETTERS, draw_letter, draw_printed_digit
from adamerge.tasks.mini.shapes import SHAPES, draw_shape
from adamerge.tasks.mini.signs import SIGNS, draw_sign
from adamerge.tasks.mini.style import Draw, Style, render
from adamerge.tasks.mini.textures import TEXTURES, draw_texture

TRAIN_SEED, TEST_SEED = 1, 2


@dataclass(frozen=True)
class MiniTask:
    """One task: what it shows, in whose words, and how its pictures are taken.

    Attributes:
        phrase: The thing itself in words, with one ``{}`` for the class name.
        kind: What all classes have in common, in words.
        field: The style of the task's images.
        draw: Draws a class.
        draw_test: Does so for the test seed, where that needs material of its own.
        draw_print: Does so for the pictures that the pretraining sees, where they are of another kind.
    """

    name: str
    classes: tuple[str, ...]
    phrase: str
    kind: str
    field: Style
    draw: Draw
    draw_test: Draw | None = None
    draw_print: Draw | None = None

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompts of the zero-shot head."""
        return tuple(form.format(self.phrase) for form in ("a photo of {}.", "a picture of {}.", "{}."))


TASKS: dict[str, MiniTask] = {
    task.name: task
    for task in (
        MiniTask(
            "digits", DIGITS, "the digit {}", "a digit",
            Style(tilt=4, shift=0.06, zoom=0.06, colour=0.2, noise=5),
            draw_scan(test=False), draw_scan(test=True), draw_printed_digit,
        ),
        MiniTask(
            "letters", LETTERS, "the letter {}", "a letter",
            Style(tilt=5, shift=0.06, zoom=0.08, colour=1, variety=1, clutter=0.1, noise=6),
            draw_letter,
        ),
        MiniTask(
            "shapes", SHAPES, "a {} shape", "a shape",
            Style(tilt=5, shift=0.06, zoom=0.1, colour=1, variety=0.7, clutter=0.3, noise=8),
            draw_shape,
        ),
        MiniTask(
            "textures", TEXTURES, "a pattern of {}", "a pattern",
            Style(tilt=5, shift=0.05, zoom=0.1, colour=1, variety=0.7, blur=0.5, noise=10),
            draw_texture,
        ),
        MiniTask(
            "signs", SIGNS, "a {} traffic sign", "a traffic sign",
            Style(tilt=4, shift=0.1, zoom=0.1, colour=0.9, variety=0.9, blur=0.6, noise=6),
            draw_sign,
        ),
        MiniTask(
            "clocks", HOURS, "a clock at {} o'clock", "a clock",
            Style(tilt=3, shift=0.06, zoom=0.06, colour=0.9, variety=0.6, noise=8),
            draw_clock,
        ),
        MiniTask(
            "faces", FACES, "a {} face", "a face",
            Style(tilt=4, shift=0.08, zoom=0.08, colour=1, variety=0.9, noise=8),
            draw_face,
        ),
        MiniTask(
            "land", LAND, "{} from above", "land from above",
            Style(tilt=5, shift=0.1, zoom=0.1, colour=0, variety=0.9, blur=0.3, noise=6),
            draw_land,
        ),
    )
}  # fmt: skip


def render_task(
    name: str, seed: int, count: int, style: Style | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of a task, classes equally often, in random order.

    Args:
        seed: Any number; ``TEST_SEED`` is kept for the test split, whose images no other seed gives.
        style: Instead of the task's own.

    Returns:
        Images, (count, SIZE, SIZE, 3), and labels, (count,).
    """
    task = TASKS[name]
    draw = task.draw_test if seed == TEST_SEED and task.draw_test else task.draw
    key = (crc32(name.encode()), seed)
    labels = np.random.default_rng(key).permutation(np.arange(count) % len(task.classes))
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for index, label in enumerate(labels.tolist()):
        images[index] = render(draw, label, np.random.default_rng((*key, index)), style or task.field)
    return images, labels
