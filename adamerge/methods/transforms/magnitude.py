"""Magnitude pruning: of every task vector only the largest entries stay."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError
from adamerge.methods.protocol import NOTHING, Context, Transform
from adamerge.methods.transforms.quantiles import kth_smallest


@dataclass(frozen=True)
class Magnitude(Transform):
    """Keep each task's largest entries; no rescaling. It is the trim of TIES.

    Of d magnitudes those stay that reach the (d - ⌊density·d⌋)-th smallest: ⌊density·d⌋ + 1 entries, and what ties.

    Args:
        density: Fraction kept, in (0, 1].
        thresholds: ``global`` (per task one for all mergeable tensors together) or ``tensor`` (one for each).
        structural_zeros: Zeros that a global threshold counts among the d entries though they are not merged, such as
            those of a text tower that was never fine-tuned. A tensor has none.

    Differs: mergekit, whose thresholds are per tensor, keeps ⌊density·d⌋ entries, one less.

    Raises:
        ConfigError: If an option is out of range.

    Source: TIES-Merging, arXiv:2306.01708 (the trim).
    """

    density: float
    thresholds: Literal["global", "tensor"]
    structural_zeros: int

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is the fraction of entries kept, in (0, 1]; found {self.density}.")
        if self.thresholds not in ("global", "tensor"):
            raise ConfigError(f"thresholds are 'global' or per 'tensor', found '{self.thresholds}'.")
        if self.structural_zeros < 0:
            raise ConfigError(f"structural_zeros is a count, 0 or more; found {self.structural_zeros}.")
        if self.structural_zeros and self.thresholds == "tensor":
            raise ConfigError(
                "structural_zeros belong to tensors that are not merged, a threshold per tensor does not see them. "
                "Set structural_zeros=0 or thresholds=global."
            )

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        if self.thresholds == "tensor":
            return lambda key, task_vectors: _keep(
                task_vectors, self._limit(lambda: [task_vectors.abs()], task_vectors[0].numel())
            )
        limit = self._limit(
            lambda: (task_vectors.abs() for task_vectors in bank.task_vectors.values()),
            sum(tensor.numel() for tensor in bank.pretrained.values()),
        )
        return lambda key, task_vectors: _keep(task_vectors, limit)

    def _limit(self, read: Callable[[], Iterable[Tensor]], size: int) -> Tensor | None:
        """The smallest magnitude that each task keeps, (K,); None where all stay. ``size`` entries are read."""
        size += self.structural_zeros
        rank = size - int(self.density * size)
        return kth_smallest(read, [rank], zeros=self.structural_zeros)[0] if rank > 0 else None

    def to_json(self) -> dict[str, Any]:
        return {"name": "magnitude", **asdict(self)}


def _keep(task_vectors: Tensor, limit: Tensor | None) -> Tensor:
    """Zero what lies below each task's limit: (K, *shape), (K,) → (K, *shape), a new tensor."""
    if limit is None:
        return task_vectors.clone()
    limit = limit.view(-1, *[1] * (task_vectors.dim() - 1))
    return task_vectors * (task_vectors.abs().float() >= limit)
