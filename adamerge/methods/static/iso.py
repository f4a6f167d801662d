"""Iso-C and Iso-CTS: merged matrices with a flat spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.matrices import nonzero, svd
from adamerge.methods.protocol import Context
from adamerge.methods.static.matrixwise import matrixwise
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.static.tsv import join


@dataclass(frozen=True, kw_only=True)
class IsoC(Scaled):
    """θ₀ + scaling · Δ, per matrix Δ = σ̄ U Vᵀ, for any other tensor Δ = (1/K) Σ_k τ_k.

    U and V are the singular vectors of Σ_k τ_k = U diag(σ) Vᵀ, and σ̄ is the mean of σ.

    Args:
        exclude: Shell patterns of keys whose matrices are merged by the mean, too.
        split_in_proj: Merge packed projections of queries, keys and values (3n x n) as three matrices, as models in
            Hugging Face's layout have them.

    Differs: where the sum has not full rank, the published code gives directions of LAPACK's choosing the same weight
    as all others. Here those are left out, and σ̄ is the mean of the singular values that are not zero, so that, as
    before, the sum of all singular values stays. FusionBench's own table is with a scaling of 1.5.

    Source: No Task Left Behind, arXiv:2502.04959.
    """

    exclude: Sequence[str]
    split_in_proj: bool

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return matrixwise(_flatten, bank, exclude=self.exclude, split_in_proj=self.split_in_proj)


def _flatten(task_vectors: Tensor) -> Tensor:
    """(K, m, n) → (m, n)."""
    left, values, right = svd(task_vectors.sum(0))
    kept = nonzero(values)
    return (left * ((values * kept).sum() / kept.sum().clamp(min=1) * kept)) @ right


@dataclass(frozen=True, kw_only=True)
class IsoCTS(Scaled):
    """θ₀ + scaling · Δ as in Iso-C, with a part of the directions from what each task adds to the common ones.

    Per matrix and with n its smaller side, each task gets s = round((n - ⌊common_fraction · n⌋)/K) directions and the
    common part the other n - K s: those of the largest singular values of Σ_k τ_k, U_c its left vectors. A task's own
    directions are the leading ones of (I - U_c U_cᵀ) τ_k. All of them beside each other are made orthogonal as in
    TSV-Merge, left and right, and every singular value becomes the mean of all that were stacked. Other tensors are
    (1/K) Σ_k τ_k. With common_fraction = 1 it is Iso-C.

    Args:
        common_fraction: Share of the directions that are common, 0 to 1.
        exclude: Shell patterns of keys whose matrices are merged by the mean, too.
        split_in_proj: Merge packed projections of queries, keys and values (3n x n) as three matrices.

    Differs: as in Iso-C, directions of singular values that are zero are left out, next to those of τ_k for its own
    part; and so are those that the tasks' own vectors share (equal experts), which the published code replaces by
    others. ``round`` goes to the even number, as there, but s is at most ⌊n/K⌋, where the published code fails.
    FusionBench has CLIP's projection to features (visual.proj) transposed, whose own directions are then other ones.

    Raises:
        ConfigError: If ``common_fraction`` is out of range.

    Source: No Task Left Behind, arXiv:2502.04959.
    """

    common_fraction: float
    exclude: Sequence[str]
    split_in_proj: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.common_fraction <= 1:
            raise ConfigError(f"method.common_fraction is from 0 to 1, found {self.common_fraction}.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return matrixwise(self._merge, bank, exclude=self.exclude, split_in_proj=self.split_in_proj)

    def _merge(self, task_vectors: Tensor) -> Tensor:
        """(K, m, n) → (m, n)."""
        num_tasks, size = len(task_vectors), min(task_vectors.shape[1:])
        own = min(round((size - int(size * self.common_fraction)) / num_tasks), size // num_tasks)
        left, values, right = svd(task_vectors.sum(0), size - num_tasks * own)
        kept = nonzero(values)
        common = left[:, kept]
        triplets = [(common, values[kept], right[kept])]
        for matrix in task_vectors if own else ():
            left, values, right = svd(matrix - common @ (common.mT @ matrix), own)
            kept = values > 16 * torch.finfo(values.dtype).eps * torch.linalg.matrix_norm(matrix)
            triplets.append((left[:, kept], values[kept], right[kept]))
        stacked = torch.cat([values for _, values, _ in triplets])
        return join(triplets, float(stacked.mean())) if len(stacked) else torch.zeros_like(task_vectors[0])
