"""TIES trim and elect, as a transform of task vectors."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError


@dataclass(frozen=True)
class Ties:
    """Keep each task's largest entries, and of those the ones that agree with the sign elected per coordinate.

    Trim: per task, over all mergeable tensors together, entries of magnitude ≥ t survive, t being the
    (d - ⌊density·d⌋)-th smallest of d magnitudes: ⌊density·d⌋ + 1 entries plus ties. Elect: the sign of the sum of
    trimmed vectors, a coordinate that sums to zero taking the majority sign of all coordinates. Entries of another sign
    become zero. No rescaling, no aggregation: AdaMerging++ learns on the K surviving vectors.

    Differs: the reference code counts the text tower's structural zeros among the d entries, which are about 22 % of
    them for ViT-B/32; here d counts mergeable (visual) entries only.

    Args:
        density: Fraction kept, in (0, 1].

    Raises:
        ConfigError: If ``density`` is outside (0, 1].

    Source: TIES-Merging, arXiv:2306.01708; AdaMerging, arXiv:2310.02575 (the ++ variants).
    """

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is the fraction of entries kept, in (0, 1]; found {self.density}.")

    def fit(self, bank: ParameterBank) -> ApplyTransform:
        thresholds = [
            _threshold((task_vectors[index] for task_vectors in bank.task_vectors.values()), self.density)
            for index in range(bank.num_tasks)
        ]
        limit = torch.stack(thresholds)
        signs = (_elect(_trim(tensor, limit)).sum() for tensor in bank.task_vectors.values())
        majority = torch.stack(list(signs)).sum().sign()

        def apply(key: str, task_vectors: Tensor) -> Tensor:
            trimmed = _trim(task_vectors, limit)
            elected = _elect(trimmed)
            elected = torch.where(elected == 0, majority, elected)
            return trimmed.mul_(trimmed.sign() == elected)

        return apply

    def to_json(self) -> dict[str, Any]:
        return {"name": "ties", **asdict(self)}


def _trim(task_vectors: Tensor, limit: Tensor) -> Tensor:
    """Zero what lies below each task's threshold: (K, *shape), (K,) → (K, *shape)."""
    limit = limit.view(-1, *[1] * (task_vectors.dim() - 1))
    return task_vectors * (task_vectors.abs().float() >= limit)


def _elect(trimmed: Tensor) -> Tensor:
    """Sign of the sum over tasks, (K, *shape) → (*shape); in float64, so that it does not depend on their order."""
    return trimmed.sum(dim=0, dtype=torch.float32 if trimmed.device.type == "mps" else torch.float64).sign()


def _threshold(tensors: Iterable[Tensor], density: float) -> Tensor:
    """The magnitude from which entries are kept, exact, without ever sorting or concatenating the tensors.

    Magnitudes of float32 order like their bit patterns, so two histograms of 16 bits each find the wanted rank.
    """
    magnitudes = [tensor.reshape(-1) for tensor in tensors]
    size = sum(tensor.numel() for tensor in magnitudes)
    rank = size - int(density * size)  # the rank-th smallest, counted from one
    device = magnitudes[0].device
    if rank < 1:
        return torch.zeros((), device=device)
    high, rank = _bucket((_bits(tensor) >> 16 for tensor in magnitudes), rank, 1 << 15, device)
    low, _ = _bucket((bits[bits >> 16 == high] & 0xFFFF for bits in map(_bits, magnitudes)), rank, 1 << 16, device)
    return ((high << 16) | low).to(torch.int32).view(torch.float32)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.float().abs().view(torch.int32)


def _bucket(values: Iterable[Tensor], rank: int | Tensor, buckets: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The value at ``rank`` (from one) among integers below ``buckets``, and the rank left within that value."""
    counts = torch.zeros(buckets, dtype=torch.int64, device=device)
    for value in values:
        counts += torch.bincount(value, minlength=buckets)
    total = counts.cumsum(0)
    index = torch.searchsorted(total, torch.as_tensor(rank, device=device))
    return index, rank - (total[index] - counts[index])
