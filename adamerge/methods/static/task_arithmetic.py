"""Task Arithmetic: one factor on the summed task vectors."""

from dataclasses import dataclass

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Scaled):
    """θ₀ + scaling · Σ_k τ_k.

    Source: Task Arithmetic, arXiv:2212.04089; a scaling of 0.3 is the field's convention for eight tasks.
    """

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return _sum


def _sum(key: str, task_vectors: Tensor) -> Tensor:
    return task_vectors.sum(0)
