"""Averaging of experts with a weight each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError, shortlist
from adamerge.methods.protocol import Context
from adamerge.methods.static.scaling import MergeVectors, Scaled

TaskWeights = Mapping[str, float] | Sequence[float] | None
"""By task, or in the order of the tasks; none where all are equal."""


@dataclass(frozen=True, kw_only=True)
class WeightedAverage(Scaled):
    """θ₀ + scaling · Σ_k w_k τ_k, Σ_k w_k = 1; with a scaling of 1 the weighted mean of the experts.

    Args:
        weights: w by task or in the order of the tasks, up to a factor; equal ones if there are none.

    Raises:
        ConfigError: If the weights are not one for every task, at least 0 and one of them above.

    Source: Model soups, arXiv:2203.05482.
    """

    weights: TaskWeights

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        shares = normalized(self.weights, bank.task_names)
        return lambda key, task_vectors: weighted_sum(shares, task_vectors)


def weighted_sum(weights: Sequence[float], task_vectors: Tensor) -> Tensor:
    """Σ_k w_k τ_k of K numbers and (K, *shape), (*shape)."""
    return torch.tensordot(task_vectors.new_tensor(list(weights)), task_vectors, dims=1)


def normalized(weights: TaskWeights, tasks: Sequence[str]) -> list[float]:
    """One weight per task, in order, with a sum of 1.

    Raises:
        ConfigError: If they are not one for every task, at least 0 and one of them above.
    """
    if weights is None:
        return [1 / len(tasks)] * len(tasks)
    if isinstance(weights, Mapping):
        if missing := [task for task in tasks if task not in weights]:
            raise ConfigError(
                f"method.weights has none for {shortlist(missing)}. Give every task one; 0 leaves it out."
            )
        if unknown := [task for task in weights if task not in tasks]:
            raise ConfigError(
                f"method.weights names {shortlist(unknown)}, not among the tasks that are merged: {shortlist(tasks)}."
            )
        weights = [weights[task] for task in tasks]
    if len(weights) != len(tasks):
        raise ConfigError(f"method.weights has {len(weights)} weights for {len(tasks)} tasks. Give one for each.")
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
        found = ", ".join(f"{weight:g}" for weight in weights)
        raise ConfigError(f"method.weights are at least 0, and one of them is above; found {found}.")
    return [weight / sum(weights) for weight in weights]
