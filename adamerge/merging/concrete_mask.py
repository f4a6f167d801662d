"""A mask over all coordinates, drawn from a relaxed Bernoulli distribution whose logits learn."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from adamerge.errors import ConfigError
from adamerge.merging.noise import uniform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""In which the logits may be kept."""


@dataclass(frozen=True)
class Draw:
    """A mask that was drawn.

    Attributes:
        mask: m̃ = m / mean(m), by key, of its tensor's shape.
        means: mean(m) by key, scalars.
    """

    mask: Mapping[str, Tensor]
    means: Mapping[str, Tensor]


class ConcreteMask(nn.Module):
    """m = σ((log u - log(1 - u) + x) / t), u uniform on (0, 1), and m̃ = m / mean(m) per tensor.

    u is a function of seed, name of the draw, key and position, so nothing random has to be kept to draw again.

    Args:
        shapes: Of the masked tensors, by key.
        init: Initial logit x of every coordinate.
        temperature: t; towards 0 the mask becomes binary.
        dtype: Of the logits: ``float32`` or ``bfloat16``.
        seed: Of all draws.

    Raises:
        ConfigError: If the dtype is another one, or the temperature is not above 0.

    Source: Concrete subspace learning, arXiv:2312.06173; the distribution, arXiv:1611.00712.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, init: float, temperature: float, dtype: str, seed: int
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"method.mask_dtype is one of {', '.join(DTYPES)}, found '{dtype}'.")
        if temperature <= 0:
            raise ConfigError(f"method.temperature is above 0, found {temperature}.")
        self.keys = tuple(shapes)
        self.logits = nn.ParameterList(torch.full(tuple(shape), init, dtype=DTYPES[dtype]) for shape in shapes.values())
        self._temperature, self._seed = temperature, seed

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Keys and logits."""
        return zip(self.keys, self.logits, strict=True)

    @torch.no_grad()
    def draw(self, name: str, *, binary: bool = False) -> Draw:
        """The mask called ``name``, in float32 or wider.

        Args:
            name: Another name, another u.
            binary: Whether m is 1 where it would exceed a half and 0 elsewhere; of a tensor with no 1, m̃ is 0.
        """
        mask, means = {}, {}
        for key, logits in self.items():
            dtype = torch.promote_types(logits.dtype, torch.float32)
            count = prod(logits.shape)
            values = uniform(f"{self._seed}/{name}/{key}", count, device=logits.device, dtype=dtype).view(logits.shape)
            values.logit_().add_(logits).div_(self._temperature).sigmoid_()
            if binary:
                values = (values > 0.5).to(dtype)
            means[key] = values.mean()
            mask[key] = values.div_(means[key].clamp(min=torch.finfo(dtype).tiny))
        return Draw(mask, means)

    @torch.no_grad()
    def slope(self, key: str, draw: Draw, gradient: Tensor) -> Tensor:
        """∂L/∂x of one tensor from ∂L/∂m̃; the division by the mean is part of the chain.

        With h = ∂L/∂m̃: ∂L/∂m = (h - mean(h ∘ m̃)) / mean(m), and ∂m/∂x = m (1 - m) / t.

        Args:
            key: Of the tensor.
            draw: Where the gradient was taken; not a binary one, whose slope is zero almost everywhere.
            gradient: ∂L/∂m̃, of the tensor's shape; overwritten.
        """
        mask = draw.mask[key]
        gradient.sub_((gradient * mask).mean()).mul_(mask)
        return gradient.mul_((1 - draw.means[key] * mask).div_(self._temperature))
