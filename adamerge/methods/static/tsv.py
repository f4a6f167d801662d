"""TSV-Merge: the leading singular vectors of all tasks beside each other, made orthogonal."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.methods.matrices import nonzero, polar_factor, svd
from adamerge.methods.protocol import Context
from adamerge.methods.static.matrixwise import matrixwise
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class TsvMerging(Scaled):
    """θ₀ + scaling · Δ, per matrix Δ = U⊥ diag(σ) V⊥ᵀ, for any other tensor Δ = (1/K) Σ_k τ_k.

    Of each τ_k the q = ⌊min(m, n)/K⌋ leading singular triplets are kept. Beside each other, their left vectors are the
    columns of U and their right ones those of V; U⊥ and V⊥ are the nearest matrices with orthonormal columns, so that
    no task's directions overlap another's. With one task Δ is its matrix; with more tasks than rows or columns it is 0.

    Args:
        exclude: Shell patterns of keys whose matrices are merged by the mean, too.
        split_in_proj: Merge packed projections of queries, keys and values (3n x n) as three matrices, as models in
            Hugging Face's layout have them.

    Differs: the original code also stacks singular vectors of singular values that are zero (of experts of low rank,
    of tensors that a task left alone), which are LAPACK's choice and still turn the others; here they are left out, as
    are the directions in which U or V, for experts that are equal, have no rank: equal experts give what one of them
    gives. The eigendecomposition that the original offers in place of the second SVD is always used in float32
    (``matrices.polar_factor``). FusionBench merges Hugging Face models, whose q, k and v are three matrices.

    Source: Task Singular Vectors, arXiv:2412.00081.
    """

    exclude: Sequence[str]
    split_in_proj: bool

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return matrixwise(_merge, bank, exclude=self.exclude, split_in_proj=self.split_in_proj)


def _merge(task_vectors: Tensor) -> Tensor:
    """(K, m, n) → (m, n)."""
    if len(task_vectors) == 1:
        return task_vectors[0]
    rank = min(task_vectors.shape[1:]) // len(task_vectors)
    return join([svd(matrix, rank) for matrix in task_vectors])


def join(triplets: Sequence[tuple[Tensor, Tensor, Tensor]], value: float | None = None) -> Tensor:
    """Singular triplets of several matrices as one matrix, their vectors made orthogonal.

    Args:
        triplets: Per matrix U (m, q), S (q) falling, V transposed (q, n); q may differ, and be 0. Triplets whose
            singular value is zero next to the largest of their matrix are left out.
        value: Taken in place of every singular value.

    Returns:
        (m, n).
    """
    kept = [nonzero(values) for _, values, _ in triplets]
    left = torch.cat([left[:, own] for (left, _, _), own in zip(triplets, kept, strict=True)], dim=1)
    values = torch.cat([values[own] for (_, values, _), own in zip(triplets, kept, strict=True)])
    right = torch.cat([right[own] for (_, _, right), own in zip(triplets, kept, strict=True)])
    values = values if value is None else torch.full_like(values, value)
    return (polar_factor(left) * values) @ polar_factor(right)
