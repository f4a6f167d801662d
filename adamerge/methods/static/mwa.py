"""Averaging of experts by how well they do."""

from dataclasses import dataclass
from typing import Literal

import torch

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import Context, Statistic
from adamerge.methods.static.scaling import MergeVectors, Scaled
from adamerge.methods.static.weighted_average import weighted_sum


@dataclass(frozen=True, kw_only=True)
class MetricsWeightedAverage(Scaled):
    """θ₀ + scaling · Σ_k w_k τ_k, w_k ∝ (1 / loss_k)ᵖ or accuracy_kᵖ, Σ_k w_k = 1.

    Args:
        scores: ``loss`` and ``accuracy`` of each expert on its own task; ``adamerge.statistics.Scores``.
        metric: Which of them.
        exponent: p, the paper's penalty factor; 0 is the mean. Of losses that are close nothing but a large one makes
            weights that are far apart.

    Differs: the paper averages checkpoints of one run, by the loss or step of each; how its penalty factor enters is
    not known here [?], the power is its plainest reading. Losses of tasks with other classes hardly compare.

    Raises:
        ConfigError: If ``metric`` is unknown or the exponent below 0.

    Source: Metrics-weighted averaging, arXiv:2504.18580.
    """

    scores: Statistic
    metric: Literal["loss", "accuracy"]
    exponent: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in ("loss", "accuracy"):
            raise ConfigError(f"metric is 'loss' or 'accuracy', found '{self.metric}'.")
        if not self.exponent >= 0:
            raise ConfigError(f"exponent is at least 0, found {self.exponent}.")

    @property
    def statistic(self) -> Statistic:
        return self.scores

    def fit(self, bank: ParameterBank, context: Context) -> MergeVectors:
        scores = context.statistics[self.metric].double().clamp(min=torch.finfo(torch.float64).tiny)
        sign = -1 if self.metric == "loss" else 1
        weights = (sign * self.exponent * scores.log()).softmax(0).tolist()  # a power of 100 overflows
        return lambda key, task_vectors: weighted_sum(weights, task_vectors)
