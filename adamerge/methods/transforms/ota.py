"""OTA: task vectors cut down to what curvature says matters, and weighted by it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError, shortlist
from adamerge.methods.protocol import NOTHING, Context, Statistic, Transform
from adamerge.methods.transforms.quantiles import kth_smallest


@dataclass(frozen=True)
class Ota(Transform):
    """w_k τ_k / Σ_j w_j, w_k = (v_kᵖ + ε) · m_k, entry by entry: each task's share in the mean weighted by w.

    Task Arithmetic on these vectors is OTA. The masks m_k are Fast Fisher Grafting's (FFG): they keep the entries of
    v_k τ_k² above a threshold of each task, over all its merged tensors together, those equal to it included. v_k
    stands for curvature.

    Args:
        curvature: v by key: Adam's second moments (``adamerge.statistics.Moments``), or the Fisher information as an
            estimate of them (``adamerge.statistics.Fisher``).
        exponent: p; 0 weights all entries that are kept alike.
        epsilon: ε. Beside vᵖ it decides whether anything is weighted: far above it all weights are equal.
        density: Fraction of each task vector kept, in (0, 1]; 1 keeps all: no FFG.
        thresholds: Of v τ², by task or one for all, in place of the density.
        normalize: Whether w_k is divided by Σ_j w_j. Without it, ``exponent`` = 0 and ε = 0 give FFG alone, m_k τ_k.
        masked: What an entry that no task keeps becomes: ``base`` (θ₀) or ``average`` (τ_k / K, which sum to the mean).
        rank_one: Whether matrices of v are first replaced by row sums ⊗ column sums / sum, as they are stored where
            room is short (the first dimension against all others, where there are more).

    Differs: the paper takes absolute thresholds, found by grafting at several densities; they hold for one scale of v
    and so carry over to no other expert, hence the density, here the 0.4 of the authors' figures. The code's ε is 1e-8,
    that of its configurations, the default here, 1e-26. The code averages where nothing is kept, its configurations
    have ``base``.

    Raises:
        ConfigError: If an option is unknown or out of range, there are both a density and thresholds or neither, or a
            task or a tensor lacks its own.

    Source: OTA and FFG, arXiv:2509.11167.
    """

    curvature: Statistic
    exponent: float
    epsilon: float
    density: float | None
    thresholds: Mapping[str, float] | float | None
    normalize: bool
    masked: Literal["base", "average"]
    rank_one: bool

    def __post_init__(self) -> None:
        if (self.density is None) == (self.thresholds is None):
            raise ConfigError("density and thresholds exclude each other. Give one, set the other null.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"density is the fraction of entries kept, in (0, 1]; found {self.density}.")
        if not (self.exponent >= 0 and self.epsilon >= 0):
            raise ConfigError(f"exponent and epsilon are at least 0, found {self.exponent} and {self.epsilon}.")
        if self.masked not in ("base", "average"):
            raise ConfigError(f"masked is 'base' or 'average', found '{self.masked}'.")

    @property
    def statistic(self) -> Statistic:
        return self.curvature

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        if missing := [key for key in bank.pretrained if key not in context.statistics]:
            raise ConfigError(f"there is no curvature of {shortlist(missing)}. Gather it for all merged tensors.")
        limits = self._limits(bank, context)

        def apply(key: str, task_vectors: Tensor) -> Tensor:
            wide = torch.float32 if task_vectors.device.type == "mps" else torch.float64
            curvature = self._curvature(key, task_vectors, context)
            limit = limits.to(task_vectors.device).view(-1, *[1] * (task_vectors.dim() - 1))
            kept = _saliency(curvature, task_vectors) >= limit
            weights = (curvature.to(wide) ** self.exponent + self.epsilon) * kept
            total = weights.sum(0)
            if self.normalize:
                weights /= torch.where(total > 0, total, 1)
            if self.masked == "average":
                weights = torch.where(total > 0, weights, 1 / len(task_vectors))
            return (weights * task_vectors).to(task_vectors.dtype)

        return apply

    def to_json(self) -> dict[str, Any]:
        thresholds = dict(self.thresholds) if isinstance(self.thresholds, Mapping) else self.thresholds
        return {"name": "ota", **asdict(self), "curvature": self.curvature.to_json(), "thresholds": thresholds}

    def _limits(self, bank: ParameterBank, context: Context) -> Tensor:
        """From which √v · |τ| entries are kept, float32 (K,)."""
        if self.density is None:
            return torch.tensor(self._absolute(bank), dtype=torch.float64).sqrt().float()

        def read() -> Iterator[Tensor]:
            for key in bank.pretrained:
                task_vectors = bank.task_vectors[key]
                yield _saliency(self._curvature(key, task_vectors, context), task_vectors)

        entries = sum(shape.numel() for shape in bank.shapes.values())
        kept = ceil(Fraction(str(self.density)) * entries)
        return kth_smallest(read, [entries - kept + 1])[0]

    def _absolute(self, bank: ParameterBank) -> list[float]:
        if isinstance(self.thresholds, Mapping):
            if missing := [task for task in bank.task_names if task not in self.thresholds]:
                raise ConfigError(f"thresholds has none for {shortlist(missing)}. Give every task one.")
            found = [float(self.thresholds[task]) for task in bank.task_names]
        else:
            found = [float(self.thresholds or 0)] * bank.num_tasks
        if not all(threshold >= 0 for threshold in found):
            raise ConfigError(f"thresholds are at least 0, found {shortlist(found)}.")
        return found

    def _curvature(self, key: str, task_vectors: Tensor, context: Context) -> Tensor:
        """v, float32 (K, *shape), where the task vectors are."""
        curvature = context.statistics[key].to(task_vectors.device).float()
        if not self.rank_one or curvature.dim() < 3:
            return curvature
        matrices = curvature.flatten(2)
        rows, columns = matrices.sum(2), matrices.sum(1)
        rows = rows / rows.sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        return (rows[:, :, None] * columns[:, None, :]).view_as(curvature)


def _saliency(curvature: Tensor, task_vectors: Tensor) -> Tensor:
    """√v · |τ| in float32: in the order of v τ², which would be below its least numbers."""
    return curvature.sqrt() * task_vectors.float().abs()
