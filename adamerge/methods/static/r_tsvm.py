"""R-TSVM: TSV-Merge with outlying entries reweighted and ranks by how dense a task vector is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.matrices import svd
from adamerge.methods.protocol import Context
from adamerge.methods.static.matrixwise import matrixwise
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.static.tsv import join


@dataclass(frozen=True, kw_only=True)
class ReweightedTsvMerging(Scaled):
    """θ₀ + scaling · Δ as in TSV-Merge (``TsvMerging``), each task's matrix reweighted and given a rank of its own.

    [?] Only the paper's abstract was at hand ("outlier weighting and sparsity-aware rank selection"), so this is our
    plainest reading of it, not a reproduction. Entries of τ_k above μ + outlier_deviations · s, mean and standard
    deviation of its own magnitudes, are multiplied by outlier_weight. With c_k the number of its entries above
    negligible · μ, its rank is ⌊min(m, n) · c_k / Σ_j c_j⌋, which for tasks of the same density is TSV-Merge's.

    Args:
        outlier_deviations: From how many standard deviations above the mean magnitude an entry is an outlier.
        outlier_weight: What outliers are multiplied by; 1 leaves them.
        negligible: The fraction of the mean magnitude up to which an entry does not count for the rank.
        exclude: Shell patterns of keys whose matrices are merged by the mean, as all other tensors are.
        split_in_proj: Merge packed projections of queries, keys and values (3n x n) as three matrices.

    Raises:
        ConfigError: If an option is negative.

    Source: abstract of arXiv:2502.06876 (RESM, called R-TSVM in its first version).
    """

    outlier_deviations: float
    outlier_weight: float
    negligible: float
    exclude: Sequence[str]
    split_in_proj: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("outlier_deviations", "outlier_weight", "negligible"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method.{name} is at least 0, found {getattr(self, name)}.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return matrixwise(self._merge, bank, exclude=self.exclude, split_in_proj=self.split_in_proj)

    def _merge(self, task_vectors: Tensor) -> Tensor:
        """(K, m, n) → (m, n)."""
        counts, weighted = [], []
        for matrix in task_vectors:
            magnitudes = matrix.abs()
            mean, deviation = magnitudes.mean(), magnitudes.std(correction=0)
            counts.append(int((magnitudes > self.negligible * mean).sum()))
            limit = (mean + self.outlier_deviations * deviation) * (1 + 1e-6)  # equal magnitudes are no outliers
            weighted.append(torch.where(magnitudes > limit, self.outlier_weight * matrix, matrix))
        if len(weighted) == 1:
            return weighted[0]
        size, total = min(task_vectors.shape[1:]), max(sum(counts), 1)
        return join([svd(matrix, size * count // total) for matrix, count in zip(weighted, counts, strict=True)])
