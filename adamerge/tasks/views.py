"""Random views of images to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.errors import ConfigError


@dataclass(frozen=True)
class RandomView:
    """A random resized crop, bicubic, and half of the time its mirror image.

    Attributes:
        crop_scale: Smallest area of the crop, as a fraction; its sides differ by a third at most.
        flip: Whether to mirror.

    Raises:
        ConfigError: If ``crop_scale`` is out of range.

    Source: the training transform of aTLAS, arXiv:2407.02880.
    """

    crop_scale: float
    flip: bool

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale <= 1:
            raise ConfigError(f"data.crop_scale lies in (0, 1], found {self.crop_scale}.")

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Views of uint8 images (B, 3, H, W), the same for the same seeds (B); torch's own generator stays as it is."""
        from torchvision.transforms import InterpolationMode, v2

        size = list(images.shape[-2:])
        crop = v2.RandomResizedCrop(
            size, scale=(self.crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        mirror = v2.RandomHorizontalFlip(0.5 if self.flip else 0.0)
        views = []
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(images, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                views.append(mirror(crop(image)))
        return torch.stack(views)
