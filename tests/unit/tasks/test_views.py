"""Random views: crops and mirror images, by their seeds alone."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.tasks.datamodule import TaskImages
from adamerge.tasks.views import RandomView


def ramps(count: int, size: int = 32) -> Tensor:
    """Images whose red rises to the right and whose green rises downward; blue is 77."""
    rise = (torch.arange(size) * 255 // (size - 1)).to(torch.uint8)
    image = torch.stack([rise.expand(size, size), rise[:, None].expand(size, size), torch.full((size, size), 77)])
    return image.to(torch.uint8).expand(count, -1, -1, -1).clone()


def views(crop_scale: float, flip: bool, seeds: Sequence[int]) -> Tensor:
    return RandomView(crop_scale, flip)(ramps(len(seeds)), seeds)


def test_a_view_depends_on_its_seed_alone() -> None:
    seeds = list(range(8))
    torch.manual_seed(1)
    before, found = torch.get_rng_state(), views(0.5, True, seeds)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(views(0.5, True, seeds[::-1]), found.flip(0))
    assert len({view.numpy().tobytes() for view in found}) == 8


def test_views_keep_shape_and_dtype_and_images_as_they_are() -> None:
    images = ramps(3)
    found = RandomView(0.5, True)(images, [0, 1, 2])
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    assert torch.equal(images, ramps(3))


def test_a_crop_has_at_least_the_given_area() -> None:
    """Width and height of a crop are the ranges of red and green; bicubic edges and the grid cost a few values."""
    areas = []
    for view in views(0.5, False, range(200)):
        width, height = (float(view[c].max() - view[c].min()) / 255 for c in (0, 1))
        areas.append(width * height)
    assert 0.42 < min(areas) < 0.6
    assert max(areas) > 0.85


def test_a_crop_magnifies() -> None:
    view = views(0.5, False, [3])[0].float()
    assert view[0].mean(0).diff().mean() < 255 / 31 * 0.99  # red rises more slowly
    assert (view[2] == 77).all()


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_views_are_mirror_images_or_none(flip: bool) -> None:
    mirrored = [bool(view[0, 0, 0] > view[0, 0, -1]) for view in views(0.9, flip, range(200))]
    assert 70 < sum(mirrored) < 130 if flip else not any(mirrored)


def stepped(count: int, seed: int = 0) -> TaskImages:
    """Batches of six of ``count`` equal images of two tasks."""
    images = {"a": ramps(count), "b": ramps(count)}
    indices = {task: torch.arange(count) for task in images}
    made = TaskImages(images, indices, images_per_batch=6, batches_per_step=1, seed=seed)
    made.view = RandomView(0.5, True)
    return made


def test_two_ranks_see_together_what_one_sees() -> None:
    whole = stepped(20).batch(3)["images"]
    halves = [stepped(20).batch(3, rank, 2)["images"] for rank in (0, 1)]
    for task in whole:
        together = torch.stack([halves[0][task], halves[1][task]], dim=1).flatten(0, 1)
        assert torch.equal(together, whole[task])


def test_every_step_task_and_seed_sees_the_same_images_otherwise() -> None:
    """There are six images, which every step sees; they are equal, so that views differ by their seeds alone."""
    batches = [(0, 3, "a"), (0, 4, "a"), (0, 3, "b"), (1, 3, "a")]
    seen = [
        view.numpy().tobytes() for seed, step, task in batches for view in stepped(6, seed).batch(step)["images"][task]
    ]
    assert len(set(seen)) == len(seen) == 24


@pytest.mark.parametrize("crop_scale", [0.0, -1.0, 1.5])
def test_a_crop_out_of_range_is_refused(crop_scale: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.crop_scale lies in \(0, 1\]"):
        RandomView(crop_scale, False)
