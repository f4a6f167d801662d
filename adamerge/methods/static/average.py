"""Simple averaging of experts."""

from dataclasses import dataclass

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class Average(Scaled):
    """θ₀ + scaling · (1/K) Σ_k τ_k; with a scaling of 1 the mean of the experts.

    Source: Model soups, arXiv:2203.05482.
    """

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return _mean


def _mean(key: str, task_vectors: Tensor) -> Tensor:
    return task_vectors.mean(0)
