"""Corruptions by hand, what they depend on, and the way of corrupted images through the cache."""

import json
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.models.protocol import ClipModel
from adamerge.tasks.corruptions import _CORRUPTIONS, Corruption
from adamerge.tasks.datasets import ImageSet, load_image_set

NAMES = list(_CORRUPTIONS)
RANDOM = ["gaussian_noise", "impulse_noise"]
SIDE = 32


def picture(seed: int = 0) -> Tensor:
    """A smooth scene with one sharp edge, uint8 (3, 32, 32)."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = [np.sin(2 * np.pi * (a * rows + b * columns) + c) for a, b, c in random.uniform(0.5, 2, (3, 3))]
    scene = np.stack(waves) * 60 + 128 + 40 * (rows > columns)
    return torch.from_numpy(scene.clip(0, 255).astype(np.uint8))


def distance(name: str, severity: int, image: Tensor, row: int = 0) -> float:
    return (Corruption(name, severity)(image, row).float() - image.float()).square().mean().sqrt().item()


# What they depend on


@pytest.mark.parametrize("name", NAMES)
def test_the_images_are_deterministic_uint8_of_the_same_size(name: str) -> None:
    image, kept = picture(), picture()
    torch.manual_seed(1)
    first, state = Corruption(name, 3)(image, 7), torch.get_rng_state()
    assert first.dtype == torch.uint8
    assert first.shape == image.shape
    assert torch.equal(image, kept)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(Corruption(name, 3)(image, 7), first)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_random_depends_on_the_row(name: str) -> None:
    corrupted = [Corruption(name, 3)(picture(), row) for row in (0, 1)]
    assert torch.equal(*corrupted) == (name not in RANDOM)


@pytest.mark.parametrize("name", NAMES)
def test_more_severe_is_further_away(name: str) -> None:
    distances = [sum(distance(name, severity, picture(seed)) for seed in range(4)) / 4 for severity in range(1, 6)]
    assert distances[0] > 1
    assert all(later > 1.02 * earlier for earlier, later in pairwise(distances))


# By hand


def test_contrast_shrinks_the_distance_from_each_channels_mean() -> None:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[0] = torch.tensor([[50, 150], [100, 100]])
    image[1] = 200
    found = Corruption("contrast", 3)(image, 0)  # 0.2
    assert found[0].tolist() == [[90, 110], [100, 100]]
    assert found[1].unique().tolist() == [200]
    assert found[2].unique().tolist() == [0]


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.08), (5, 0.38)])
def test_gaussian_noise_has_its_spread_and_no_bias(severity: int, sigma: float) -> None:
    grey = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    noise = (Corruption("gaussian_noise", severity)(grey, 3).double() - 128) / 255
    inside = noise.abs() < 0.4  # of what is not cut off at black and white
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    expected = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * sigma
    expected = expected[expected.abs() < 0.4].std().item()
    assert noise[inside].std().item() == pytest.approx(expected, rel=0.03)
    assert torch.corrcoef(noise.flatten(1)).triu(1).abs().max() < 0.05  # no two channels share it


@pytest.mark.parametrize(("severity", "share"), [(1, 0.03), (5, 0.27)])
def test_impulse_noise_makes_its_share_black_or_white(severity: int, share: float) -> None:
    grey = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    found = Corruption("impulse_noise", severity)(grey, 3)
    assert found.unique().tolist() == [0, 128, 255]
    for value in (0, 255):
        assert (found == value).double().mean().item() == pytest.approx(share / 2, rel=0.1)


def test_pixelate_repeats_means_of_squares() -> None:
    image = (2 * torch.arange(64, dtype=torch.uint8)).view(8, 8).expand(3, 8, 8)
    found = Corruption("pixelate", 2)(image, 0)  # half the size
    means = image[0].float().view(4, 2, 4, 2).mean((1, 3))
    assert torch.equal(found[0], means.to(torch.uint8).repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(found[0], found[2])


def test_jpeg_is_pillows_at_that_quality(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(file, quality=15)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(Corruption("jpeg", 3)(picture(), 0), expected)


# Through the cache


class Square:
    """The part of a ClipModel that data sets use, for images that have their size."""

    preprocess_hash = "as it is"

    def resize(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in range(3):
        file = tmp_path / "data" / "test" / "ab"[row % 2] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(row).permute(1, 2, 0).numpy()).save(file)
    return tmp_path


def load(folder: Path, corruption: Corruption | None) -> ImageSet:
    clip = cast(ClipModel, Square())
    return load_image_set(str(folder / "data"), "test", clip, folder / "cache", corruption=corruption)


ALL = [Corruption(name, severity) for name in NAMES for severity in (1, 5)]


@pytest.mark.parametrize("corruption", ALL, ids=lambda corruption: f"{corruption.name}-{corruption.severity}")
def test_every_corruption_reaches_the_cache(folder: Path, corruption: Corruption) -> None:
    """Whatever memory layout it leaves its images in."""
    clean = load(folder, None)
    found = load(folder, corruption)
    expected = torch.stack([corruption(image, row) for row, image in enumerate(clean.images)])
    assert torch.equal(found.images, expected)
    assert torch.equal(load(folder, corruption).images, expected)  # the second time from the file
    assert found.labels is not None
    assert clean.labels is not None
    assert found.labels.tolist() == clean.labels.tolist() == [0, 0, 1]


def test_every_corruption_and_severity_has_a_cache_of_its_own(folder: Path) -> None:
    corruptions = [None, *(Corruption(name, severity) for name in NAMES for severity in range(1, 6))]
    keys = {load(folder, corruption).key for corruption in corruptions}
    assert len(keys) == 1 + 5 * len(NAMES)
    clean = load(folder, None)
    assert torch.equal(clean.images[0], picture(0))
    shapes = [json.loads(file.read_text())["shape"] for file in (folder / "cache" / "images").glob("*.json")]
    assert shapes == [[3, 3, SIDE, SIDE]] * len(keys)


# Errors


def test_what_is_no_corruption_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.corruption: expected one of gaussian_noise, .*, jpeg, found 'fog'"):
        Corruption("fog", 1)


@pytest.mark.parametrize("severity", [0, 6])
def test_a_severity_out_of_range_is_refused(severity: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.severity lies between 1 and 5, found {severity}"):
        Corruption("jpeg", severity)
