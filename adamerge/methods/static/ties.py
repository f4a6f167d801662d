"""TIES-Merging: trim, elect a sign, merge what agrees."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.transforms.ties import Ties


@dataclass(frozen=True, kw_only=True)
class TiesMerging(Scaled):
    """θ₀ + scaling · aggregate of the trimmed task vectors that agree with the elected sign.

    Args:
        density: Fraction of each task vector kept.
        thresholds: ``global`` (per task one magnitude for all mergeable tensors together) or ``tensor`` (one for each).
        structural_zeros: Zeros that a global threshold counts besides, as ``transforms.Magnitude`` takes them.
        aggregation: ``sum``, ``mean`` (over the agreeing entries that are not zero) or ``max`` (largest magnitude).

    Differs: the original aggregates by ``mean`` with a searched scaling near 1; AdaMerging and FusionBench, whose
    tables people compare with, by ``sum`` with a scaling of 0.3. ``sum`` and ``mean`` differ by up to K times, so it
    does not carry over.

    Raises:
        ConfigError: If an option is out of range.

    Source: TIES-Merging, arXiv:2306.01708.
    """

    density: float
    thresholds: Literal["global", "tensor"]
    structural_zeros: int
    aggregation: Literal["sum", "mean", "max"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation not in ("sum", "mean", "max"):
            raise ConfigError(f"unknown aggregation '{self.aggregation}'. Choose sum, mean or max.")
        self._ties()

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        elect = self._ties().fit(bank)
        return lambda key, task_vectors: self._aggregate(elect(key, task_vectors))

    def _ties(self) -> Ties:
        return Ties(self.density, self.thresholds, self.structural_zeros)

    def _aggregate(self, task_vectors: Tensor) -> Tensor:
        """(K, *shape) → (*shape)."""
        total = task_vectors.sum(dim=0)
        if self.aggregation == "mean":
            return total / (task_vectors != 0).sum(dim=0).clamp(min=1)
        if self.aggregation == "max":
            return task_vectors.abs().amax(dim=0) * total.sign()
        return total
