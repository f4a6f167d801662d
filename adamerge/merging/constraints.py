"""From the raw parameter to λ, and back for the initial value."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.errors import ConfigError


@dataclass(frozen=True)
class Constraint:
    """A differentiable map on coefficients, (K, G) → (K, G).

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
    "identity": Constraint(torch.clone, torch.clone, lambda init: True, "any value"),
    # AdaMerging clips in the forward pass only: the raw parameter may leave [0, 1], and then gets no gradient.
    "clamp": Constraint(_clamp, torch.clone, lambda init: True, "any value"),
    "sigmoid": Constraint(
        torch.sigmoid, torch.logit, lambda init: bool(((init > 0) & (init < 1)).all()), "values between 0 and 1"
    ),
    # Softmax fixes the sum over tasks at 1, so an initial λ is kept up to that scale: equal values become 1/K.
    "softmax": Constraint(
        lambda raw: raw.softmax(dim=0), torch.log, lambda init: bool((init > 0).all()), "values above 0"
    ),
}


def constraint_named(name: str) -> Constraint:
    """Look a constraint up.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in CONSTRAINTS:
        raise ConfigError(f"unknown constraint '{name}'. Choose one of {', '.join(sorted(CONSTRAINTS))}.")
    return CONSTRAINTS[name]
