"""Delta-guided fusion: experts weigh as much as they have moved."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class DeltaGuidedFusion(Scaled):
    """θ₀ + scaling · Σ_k w_k τ_k, w_k = |τ_k|^p / Σ_j |τ_j|^p, of every entry or of the norms of a tensor.

    We have not seen the formula: the paper's abstract says that every parameter's deviation from its pretrained value
    gives its weight, and this is the plainest reading of it. What no expert has moved stays.

    Args:
        granularity: What |τ_k| is: the magnitude of an ``entry``, or the norm of a ``tensor``.
        exponent: p; 0 gives the mean of the experts, and the greater it is, the more of the one that moved farthest.

    Raises:
        ConfigError: If an option is out of range.

    Source: CoDiEmb, arXiv:2508.11442.
    """

    granularity: Literal["entry", "tensor"]
    exponent: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("entry", "tensor"):
            raise ConfigError(f"method.granularity is 'entry' or 'tensor', found '{self.granularity}'.")
        if not self.exponent >= 0:
            raise ConfigError(f"method.exponent is at least 0, found {self.exponent:g}.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return self._merge

    def _merge(self, key: str, task_vectors: Tensor) -> Tensor:
        sizes = task_vectors.abs()
        if self.granularity == "tensor":
            highest = sizes.amax()  # squares of what is small must not vanish
            lengths = (sizes / highest.where(highest > 0, 1)).reshape(len(sizes), -1).norm(dim=1)
            sizes = lengths.reshape(-1, *[1] * (task_vectors.dim() - 1))
        largest = sizes.amax(0)
        powers = (sizes / largest.where(largest > 0, 1)).pow(self.exponent)  # at most 1, whatever p
        total = powers.sum(0)
        return (powers / total.where(total > 0, 1) * task_vectors).sum(0)
