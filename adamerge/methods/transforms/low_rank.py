"""Low-rank approximation of task vectors, matrix by matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError
from adamerge.methods.matrices import blocks_of, check_patterns, svd
from adamerge.methods.protocol import NOTHING, Context, Transform


@dataclass(frozen=True)
class LowRank(Transform):
    """Keep the leading singular directions of each task's matrices; other tensors stay as they are.

    Args:
        rank_share: How many, as a fraction of the matrix's smaller side, in (0, 1]: ⌊rank_share · min(m, n)⌋, at least
            one. None where ``energy`` is given.
        energy: As many as hold this fraction of Σσ², in (0, 1]; another number for each task. None where ``rank_share``
            is given.
        exclude: Shell patterns of keys whose matrices stay as they are.
        split_in_proj: Take packed projections of queries, keys and values (3n x n) for three matrices.

    Raises:
        ConfigError: If not exactly one of ``rank_share`` and ``energy`` is given, or it is out of range.

    Source: TSV-Compress in Task Singular Vectors, arXiv:2412.00081, where a tenth of the rank keeps 99 % of accuracy.
    """

    rank_share: float | None
    energy: float | None
    exclude: Sequence[str]
    split_in_proj: bool

    def __post_init__(self) -> None:
        given = [share for share in (self.rank_share, self.energy) if share is not None]
        if len(given) != 1 or not 0 < given[0] <= 1:
            raise ConfigError(
                f"a low rank is given by rank_share or by energy, one of them in (0, 1] and the other null; found "
                f"rank_share={self.rank_share} and energy={self.energy}."
            )

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        check_patterns(self.exclude, bank.pretrained)
        return self._apply

    def to_json(self) -> dict[str, Any]:
        return {
            "name": "low_rank",
            "rank_share": self.rank_share,
            "energy": self.energy,
            "exclude": list(self.exclude),
            "split_in_proj": self.split_in_proj,
        }

    def _apply(self, key: str, task_vectors: Tensor) -> Tensor:
        blocks = blocks_of(key, task_vectors, exclude=self.exclude, split_in_proj=self.split_in_proj)
        if not blocks:
            return task_vectors.clone()
        wide = [block.float() if block.dtype.itemsize < 4 else block for block in blocks]
        return torch.cat([self._truncate(block) for block in wide], dim=1).to(task_vectors.dtype)

    def _truncate(self, matrices: Tensor) -> Tensor:
        """(K, m, n) → (K, m, n)."""
        size = min(matrices.shape[1:])
        if self.rank_share is not None:
            rank = max(1, int(self.rank_share * size + 1e-9))  # .29 · 100 is a little below 29
            if rank == size:
                return matrices
            left, values, right = svd(matrices, rank)
            return (left * values.unsqueeze(1)) @ right
        if self.energy is None or self.energy == 1:
            return matrices
        left, values, right = svd(matrices)
        energy = values.square().cumsum(1)
        before = torch.cat([energy.new_zeros(len(energy), 1), energy[:, :-1]], dim=1)  # of all larger ones
        kept = before < self.energy * energy[:, -1:]
        return (left * (values * kept).unsqueeze(1)) @ right
