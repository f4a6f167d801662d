"""From the raw parameter to λ, and back for the initial value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adamerge.errors import ConfigError


class Constraint(Protocol):
    """A differentiable map from a raw parameter, of any shape, to λ (K, G); one with tensors of its own is a module."""

    @property
    def range(self) -> str:
        """The admitted initial values, in words."""
        ...

    def forward(self, raw: Tensor, /) -> Tensor:
        """Raw parameter → λ."""
        ...

    def inverse(self, coefficients: Tensor, /) -> Tensor:
        """Initial λ → raw parameter."""
        ...

    def admits(self, coefficients: Tensor, /) -> bool:
        """Whether an initial λ can be reached."""
        ...


@dataclass(frozen=True)
class Named:
    """A constraint on coefficients of functions alone, (K, G) → (K, G).

    Attributes:
        forward: Raw parameter → λ.
        inverse: Initial λ → raw parameter.
        admits: Whether an initial λ (K, G) can be reached.
        range: The admitted initial values, in words.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    admits: Callable[[Tensor], bool]
    range: str


def _clamp(raw: Tensor) -> Tensor:
    """Clamp to [0, 1] with slope 1 at both ends, whatever slope this version of torch.clamp has there."""
    return torch.where((raw < 0) | (raw > 1), raw.detach().clamp(0, 1), raw)


CONSTRAINTS: dict[str, Constraint] = {
    "identity": Named(torch.clone, torch.clone, lambda init: True, "any value"),
    # AdaMerging clips in the forward pass only: the raw parameter may leave [0, 1], and then gets no gradient.
    "clamp": Named(_clamp, torch.clone, lambda init: True, "any value"),
    "sigmoid": Named(
        torch.sigmoid, torch.logit, lambda init: bool(((init > 0) & (init < 1)).all()), "values between 0 and 1"
    ),
    # Softmax fixes the sum over tasks at 1, so an initial λ is kept up to that scale: equal values become 1/K.
    "softmax": Named(lambda raw: raw.softmax(dim=0), torch.log, lambda init: bool((init > 0).all()), "values above 0"),
}


def constraint_named(name: str) -> Constraint:
    """Look a constraint up.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in CONSTRAINTS:
        raise ConfigError(f"unknown constraint '{name}'. Choose one of {', '.join(sorted(CONSTRAINTS))}.")
    return CONSTRAINTS[name]
