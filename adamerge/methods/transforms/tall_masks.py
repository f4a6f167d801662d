"""TALL masks: where the multi-task vector serves a task."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.parameter_bank import ApplyTransform
from adamerge.errors import ConfigError
from adamerge.methods.coordinates import blocks, total
from adamerge.methods.protocol import NOTHING, Context, Statistic, Transform


@dataclass(frozen=True)
class TallMasks(Transform):
    """m_t ∘ τ_MTL for each task t: what of the multi-task vector stands for its own task vector.

    τ_MTL = Σ_k τ_k; m_t = 1 where |τ_t| > λ_t · |τ_MTL - τ_t|. These are K reconstructions, not parts of one model: to
    be scaled by one-hot coefficients, or looked at.

    Args:
        threshold: λ, 0 or more: one number, or one per task in their order.
        before: Applied to the task vectors that τ_MTL sums (TIES), not to those that it is compared with; or None.

    Raises:
        ConfigError: If a threshold is negative, or there is another number of them than of tasks.

    Differs: the paper chooses λ_t from 0.2 to 0.6 per task on labelled images; here it is given. FusionBench compares
    |θ₀ - τ_t|, weights with vectors, which looks like a slip.

    Source: TALL-masks, arXiv:2405.07813.
    """

    threshold: float | Sequence[float]
    before: Transform | None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    @property
    def statistic(self) -> Statistic | None:
        return self.before.statistic if self.before else None

    def fit(self, bank: ParameterBank, context: Context = NOTHING) -> ApplyTransform:
        thresholds = per_task(self.threshold, bank.num_tasks)
        prepare = self.before.fit(bank, context) if self.before else None

        def apply(key: str, task_vectors: Tensor) -> Tensor:
            prepared = prepare(key, task_vectors) if prepare else task_vectors
            kept = []
            for part, merged in zip(blocks(task_vectors), map(total, blocks(prepared)), strict=True):
                masks = claims(part, merged, thresholds)
                kept.append(torch.stack([merged * mask for mask in masks]).to(task_vectors.dtype))
            return torch.cat(kept, dim=1).view(task_vectors.shape)

        return apply

    def to_json(self) -> dict[str, Any]:
        return {"name": "tall_masks", **options_to_json(self.threshold, self.before)}


def claims(task_vectors: Tensor, multi_task: Tensor, thresholds: Sequence[float]) -> Iterator[Tensor]:
    """Per task the mask m_t, bool (n,), of task vectors (K, n) and what they were merged to, (n,)."""
    for task_vector, threshold in zip(task_vectors, thresholds, strict=True):
        yield task_vector.abs() > threshold * (multi_task - task_vector).abs()


def check_threshold(threshold: float | Sequence[float]) -> None:
    """Raise ConfigError for a negative λ."""
    values = threshold if isinstance(threshold, Sequence) else [threshold]
    if not values or min(values) < 0:
        raise ConfigError(f"threshold is one number, 0 or more, or one per task; found {threshold}.")


def per_task(threshold: float | Sequence[float], num_tasks: int) -> Sequence[float]:
    """λ of each task; ConfigError if there is another number of them."""
    thresholds = threshold if isinstance(threshold, Sequence) else [threshold] * num_tasks
    if len(thresholds) != num_tasks:
        raise ConfigError(f"threshold has {len(thresholds)} numbers for {num_tasks} tasks. Give one, or one per task.")
    return thresholds


def options_to_json(threshold: float | Sequence[float], before: Transform | None) -> dict[str, Any]:
    return {
        "threshold": list(threshold) if isinstance(threshold, Sequence) else threshold,
        "before": before.to_json() if before else None,
    }
