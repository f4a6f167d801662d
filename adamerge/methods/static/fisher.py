"""Fisher merging: every entry where its experts' Fisher information wants it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError, shortlist
from adamerge.methods.protocol import Context, Statistic
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.static.weighted_average import TaskWeights, normalized


@dataclass(frozen=True, kw_only=True)
class FisherMerging(Scaled):
    """θ₀ + scaling · Σ_k w_k F_k τ_k / Σ_k w_k F_k, entry by entry; with a scaling of 1 that of the experts themselves.

    With Gaussians of precision F_k around the experts it is the most likely θ. Where every F_k is zero, and there is no
    floor, it is the mean by the λ_k.

    Args:
        fisher: Diagonal Fisher information by key; ``adamerge.statistics.Fisher``.
        weights: λ by task or in the order of the tasks, up to a factor; equal ones if there are none.
        normalize: Whether w_k is λ_k / ‖F_k‖₂, the norm being that of all merged tensors together, in place of λ_k.
            An expert that is certain of everything has no F_k, and then no say.
        floor: Below which no entry of F_k counts.
        floor_unit: ``mean``: it is a fraction of the mean of F_k over all merged entries; ``absolute``: a number.
        floor_rule: ``max``: smaller entries count as the floor; ``add``: it is added to all.
        floor_tasks: Whose F_k have the floor; None for all.

    Differs: the reference code has the floor for its target model alone (``floor_tasks``), as an absolute 1e-6.
    FusionBench adds 1e-6 to all F_k and to their norms. Entries of F_k are about 1e-10 where a CLIP is certain, so that
    an absolute floor makes nearly all of them equal and the merge nearly the mean; hence ``mean``.

    Raises:
        ConfigError: If an option is unknown or out of range, or a task or a tensor has no F_k.

    Source: Fisher merging, arXiv:2111.09832.
    """

    fisher: Statistic
    weights: TaskWeights
    normalize: bool
    floor: float
    floor_unit: Literal["mean", "absolute"]
    floor_rule: Literal["max", "add"]
    floor_tasks: Sequence[str] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.floor >= 0:
            raise ConfigError(f"floor is at least 0, found {self.floor}.")
        if self.floor_unit not in ("mean", "absolute"):
            raise ConfigError(f"floor_unit is 'mean' or 'absolute', found '{self.floor_unit}'.")
        if self.floor_rule not in ("max", "add"):
            raise ConfigError(f"floor_rule is 'max' or 'add', found '{self.floor_rule}'.")

    @property
    def statistic(self) -> Statistic:
        return self.fisher

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        floored = bank.task_names if self.floor_tasks is None else tuple(self.floor_tasks)
        if unknown := [task for task in floored if task not in bank.task_names]:
            raise ConfigError(
                f"method.floor_tasks names {shortlist(unknown)}, not among the tasks that are merged: "
                f"{shortlist(bank.task_names)}."
            )
        shares = torch.tensor(normalized(self.weights, bank.task_names), dtype=torch.float64)
        mean, norm = _sizes(bank, context)
        floors = torch.full_like(mean, self.floor) if self.floor_unit == "absolute" else self.floor * mean
        floors *= torch.tensor([task in floored for task in bank.task_names])
        factors = torch.where(norm > 0, shares / norm, 0) if self.normalize else shares

        def merge(key: str, task_vectors: Tensor) -> Tensor:
            wide = torch.float32 if task_vectors.device.type == "mps" else torch.float64
            ones = [1] * (task_vectors.dim() - 1)
            factor, floor, share = (
                numbers.to(task_vectors.device, wide).view(-1, *ones) for numbers in (factors, floors, shares)
            )
            weights = context.statistics[key].to(task_vectors.device, wide)
            weights = (weights.clamp(min=floor) if self.floor_rule == "max" else weights + floor) * factor
            total = weights.sum(0)
            return (torch.where(total > 0, weights / total, share) * task_vectors).sum(0)

        return merge


def _sizes(bank: ParameterBank, context: Context) -> tuple[Tensor, Tensor]:
    """Mean and Euclidean norm of each task's F_k over all tensors, float64 (K,) each, on the CPU."""
    if missing := [key for key in bank.pretrained if key not in context.statistics]:
        raise ConfigError(f"there is no Fisher information of {shortlist(missing)}. Gather it for all merged tensors.")
    total = torch.zeros(bank.num_tasks, dtype=torch.float64)
    squares, entries = total.clone(), 0
    for key, shape in bank.shapes.items():
        values = context.statistics[key].double().flatten(1) if shape else context.statistics[key].double()[:, None]
        total += values.sum(1)
        squares += values.square().sum(1)
        entries += shape.numel()
    return total / entries, squares.sqrt()
