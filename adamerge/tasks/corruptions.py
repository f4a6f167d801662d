"""Corrupted images, to see how robust a merge is."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.errors import ConfigError


def _gaussian_noise(image: Tensor, sigma: float, random: torch.Generator) -> Tensor:
    return image + sigma * torch.randn(image.shape, generator=random)


def _impulse_noise(image: Tensor, share: float, random: torch.Generator) -> Tensor:
    draw = torch.rand(image.shape, generator=random)
    return image.masked_fill(draw < share / 2, 0.0).masked_fill(draw > 1 - share / 2, 1.0)


def _contrast(image: Tensor, factor: float, random: torch.Generator) -> Tensor:
    mean = image.mean((1, 2), keepdim=True)
    return (image - mean) * factor + mean


def _pixelate(image: Tensor, factor: float, random: torch.Generator) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    picture = to_pil_image((image * 255).round().to(torch.uint8))
    size = [max(1, int(side * factor)) for side in picture.size]
    box = Image.Resampling.BOX
    return pil_to_tensor(picture.resize(size, box).resize(picture.size, box)).float() / 255


def _jpeg(image: Tensor, quality: float, random: torch.Generator) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    buffer = io.BytesIO()
    to_pil_image((image * 255).round().to(torch.uint8)).save(buffer, "JPEG", quality=int(quality))
    with Image.open(buffer) as coded:
        return pil_to_tensor(coded).float() / 255


_CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
}


@dataclass(frozen=True)
class Corruption:
    """One of ImageNet-C's corruptions in one of its five severities, on images in the size of the model.

    Args:
        name: ``gaussian_noise``, ``impulse_noise``, ``contrast``, ``pixelate`` or ``jpeg``.
        severity: 1 to 5.

    Raises:
        ConfigError: If there is no such corruption or severity.

    Differs: the original corrupts images of 224 x 224 before a network resizes them; here it is done in the size that
    the model reads.

    Source: Hendrycks and Dietterich, arXiv:1903.12261.
    """

    name: str
    severity: int

    def __post_init__(self) -> None:
        if self.name not in _CORRUPTIONS:
            raise ConfigError(f"data.corruption: expected one of {', '.join(_CORRUPTIONS)}, found '{self.name}'.")
        if not 1 <= self.severity <= 5:
            raise ConfigError(f"data.severity lies between 1 and 5, found {self.severity}.")

    def __call__(self, image: Tensor, row: int) -> Tensor:
        """uint8 (3, H, W) → the same, corrupted; what is random depends on ``row`` alone."""
        corrupt, strengths = _CORRUPTIONS[self.name]
        random = torch.Generator().manual_seed(row)
        changed = corrupt(image.float() / 255, strengths[self.severity - 1], random)
        return (changed * 255).round().clamp(0, 255).to(torch.uint8)
