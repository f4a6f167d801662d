"""One scaling of a merged vector, given or searched for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from adamerge.errors import ConfigError


@dataclass(frozen=True)
class Scaled:
    """Base of the methods that add ``scaling`` times a merged vector to θ₀.

    Args:
        scaling: The factor, or ``search``: the best of ``grid`` by mean normalised accuracy on the labelled split.
        grid: Factors to search.

    Raises:
        ConfigError: If ``scaling`` is another word, or a search has no grid.
    """

    scaling: float | Literal["search"]
    grid: Sequence[float]

    def __post_init__(self) -> None:
        if isinstance(self.scaling, str) and self.scaling != "search":
            raise ConfigError(f"scaling is a number or 'search', found '{self.scaling}'.")
        if self.scaling == "search" and not self.grid:
            raise ConfigError("scaling=search needs at least one factor in method.grid.")

    def candidates(self) -> Sequence[Self]:
        return [replace(self, scaling=factor) for factor in self.grid] if self.scaling == "search" else [self]

    @property
    def factor(self) -> float:
        """The scaling as a number.

        Raises:
            ConfigError: If it has not been searched for yet.
        """
        if isinstance(self.scaling, str):
            raise ConfigError("the scaling has not been searched for yet. Choose one of candidates() first.")
        return self.scaling
