"""Model Stock: the nearer to the mean of the experts, the more their directions agree."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled


@dataclass(frozen=True, kw_only=True)
class ModelStock(Scaled):
    """θ₀ + scaling · t · (1/K) Σ_k τ_k, t = K c / (1 + (K - 1) c), c the cosine of the angle between two task vectors.

    With a scaling of 1 it is t · mean of the experts + (1 - t) · θ₀: for task vectors of equal lengths and angles the
    point between those two that is nearest to the centre about which the experts scatter. One expert is kept as it is.

    Args:
        granularity: What has a t of its own: ``tensor``, or ``filter``: each of its rows (what has one dimension is one
            row).
        average: What stands for c where there are more than two task vectors: the mean ``cosine`` of their pairs, or
            the cosine of the mean ``angle``. A pair with a zero vector has a cosine of 0.

    Differs: the paper has one angle for all pairs; which mean takes its place is mergekit's choice (``cosine``) or
    FusionBench's (``angle``). Where c is negative, t is 0: the formula leaves [0, 1] there, for a pole at -1 / (K - 1).
    FusionBench adds 1e-8 to the product of two lengths, which lowers c where task vectors are shorter than about 1e-3.
    To mergekit, a filter of a convolution is a row of its kernel; here it is all that makes up one output.

    Raises:
        ConfigError: If an option is unknown.

    Source: Model Stock, arXiv:2403.19522.
    """

    granularity: Literal["tensor", "filter"]
    average: Literal["cosine", "angle"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("tensor", "filter"):
            raise ConfigError(f"method.granularity is 'tensor' or 'filter', found '{self.granularity}'.")
        if self.average not in ("cosine", "angle"):
            raise ConfigError(f"method.average is 'cosine' or 'angle', found '{self.average}'.")

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        return self._merge

    def _merge(self, key: str, task_vectors: Tensor) -> Tensor:
        num_tasks, shape = len(task_vectors), task_vectors.shape[1:]
        mean = task_vectors.mean(0)
        if num_tasks == 1:
            return mean
        rows = shape[0] if self.granularity == "filter" and len(shape) > 1 else 1
        cosine = self._cosine(task_vectors.reshape(num_tasks, rows, -1)).clamp(min=0)  # (R,)
        ratio = num_tasks * cosine / (1 + (num_tasks - 1) * cosine)
        return (ratio.to(mean)[:, None] * mean.reshape(rows, -1)).reshape(shape)

    def _cosine(self, task_vectors: Tensor) -> Tensor:
        """c of every row, (K, R, n) → (R,)."""
        wide = torch.float32 if task_vectors.device.type == "mps" else torch.float64
        by_row = task_vectors.to(wide).transpose(0, 1)  # (R, K, n)
        lengths = by_row.norm(dim=2, keepdim=True)
        by_row = by_row / torch.where(lengths > 0, lengths, 1)
        first, second = torch.triu_indices(by_row.shape[1], by_row.shape[1], 1, device=by_row.device)
        cosines = (by_row @ by_row.mT)[:, first, second].clamp(-1, 1)  # (R, pairs)
        return cosines.acos().mean(1).cos() if self.average == "angle" else cosines.mean(1)
