"""Fisher information by definition, Fisher merging and OTA on flat vectors; loops, sorting, no tricks."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def log_probabilities(network: nn.Module, images: Tensor, head: Tensor) -> Tensor:
    """(B, C)."""
    return F.log_softmax(F.normalize(network(images), dim=-1) @ head.T, dim=-1)


def squared_gradient(scalar: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [gradient**2 for gradient in torch.autograd.grad(scalar, parameters)]


def exact(network: nn.Module, images: Tensor, head: Tensor) -> dict[str, Tensor]:
    """Σ_x Σ_c p_c (∂ log p_c / ∂θ)² / N: one image and one class after the other."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for image in images:
        for label in range(len(head)):
            logs = log_probabilities(network, image[None], head)[0]
            for place, square in zip(total, squared_gradient(logs[label], parameters), strict=True):
                place += logs[label].detach().exp() * square
    return {name: place / len(images) for name, place in zip(names, total, strict=True)}


def batched(network: nn.Module, images: Tensor, head: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Σ_b (∂ Σ_{x∈b} Σ_c √p_c log p_c / ∂θ)² / N, p under the root without a gradient."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for start in range(0, len(images), batch_size):
        logs = log_probabilities(network, images[start : start + batch_size], head)
        scalar = (logs.exp().sqrt().detach() * logs).sum()
        for place, square in zip(total, squared_gradient(scalar, parameters), strict=True):
            place += square
    return {name: place / len(images) for name, place in zip(names, total, strict=True)}


def by_differences(logs: Callable[[float], Tensor], step: float) -> float:
    """Σ_x Σ_c p_c (∂ log p_c)² / N along one entry, ``logs(h)`` (N, C) being those with h added to it."""
    slope = (logs(step) - logs(-step)) / (2 * step)
    return float((logs(0).exp() * slope**2).sum(1).mean())


def merge(
    fisher: np.ndarray,
    task_vectors: np.ndarray,
    *,
    weights: Sequence[float],
    normalize: bool,
    floor: float,
    unit: str,
    rule: str,
    floored: Sequence[int],
) -> np.ndarray:
    """Σ_k w_k F_k τ_k / Σ_k w_k F_k of (K, d) and (K, d); by the weights alone where the sum is 0."""
    merged = np.zeros(fisher.shape[1])
    for entry in range(fisher.shape[1]):
        above, below = 0.0, 0.0
        for task, row in enumerate(fisher):
            value = row[entry]
            if task in floored:
                limit = floor * row.mean() if unit == "mean" else floor
                value = max(value, limit) if rule == "max" else value + limit
            factor = weights[task] / np.sqrt((row**2).sum()) if normalize else weights[task]
            above += factor * value * task_vectors[task, entry]
            below += factor * value
        plain = np.dot(weights, task_vectors[:, entry]) / np.sum(weights)
        merged[entry] = above / below if below else plain
    return merged


def fusion_bench(fisher: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Its merge of experts (K, d), with ``normalize_fisher_weight`` and ``minimal_fisher_weight=1e-6``."""
    share = 1 / (np.sqrt((fisher**2).sum(1)) + 1e-6)
    weights = (share / share.sum())[:, None] * (fisher + 1e-6)
    return (weights * experts).sum(0) / weights.sum(0)


# A worked example: K = 2, d = 4.
#
#   F_a = 3 1 0 0    τ_a =  1 2 3 4    means of F: 1 and 1
#   F_b = 1 1 2 0    τ_b = -1 0 1 8
#
# Plain:               (3 - 1)/4 = .5   (2 + 0)/2 = 1   1                    nobody knows: (4 + 8)/2 = 6
# λ = 3 : 1            (9 - 1)/10 = .8  (6 + 0)/4 = 1.5 1                    (3·4 + 8)/4 = 5
# floor 1, max:        .5               1               (3 + 2)/3 = 5/3      6
# floor 1, add:        (4 - 2)/6 = 1/3  (4 + 0)/4 = 1   (3 + 3)/4 = 1.5      6
# floor .5 of mean:    .5               1               (1.5 + 2)/2.5 = 1.4  6
# floor 1, max, of a:  .5               1               5/3                  4 (a alone has a say)
FISHER = ((3.0, 1.0, 0.0, 0.0), (1.0, 1.0, 2.0, 0.0))
TASK_VECTORS = ((1.0, 2.0, 3.0, 4.0), (-1.0, 0.0, 1.0, 8.0))
FISHER_MERGED = {
    "plain": (0.5, 1, 1, 6),
    "weights": (0.8, 1.5, 1, 5),
    "max": (0.5, 1, 5 / 3, 6),
    "add": (1 / 3, 1, 1.5, 6),
    "mean": (0.5, 1, 1.4, 6),
    "target": (0.5, 1, 5 / 3, 4),
}


def ota(
    curvature: np.ndarray,
    task_vectors: np.ndarray,
    *,
    exponent: float,
    epsilon: float,
    kept: int | None,
    thresholds: Sequence[float],
    masked: str,
) -> np.ndarray:
    """Of (K, d) and (K, d), (d,); ``kept`` entries of each task, or those with v τ² from the thresholds on."""
    weights = np.zeros_like(curvature)
    for task, (row, vector) in enumerate(zip(curvature, task_vectors, strict=True)):
        saliency = row * vector**2
        limit = thresholds[task] if kept is None else sorted(saliency, reverse=True)[kept - 1]
        weights[task] = (row**exponent + epsilon) * (saliency >= limit)
    merged = np.zeros(curvature.shape[1])
    for entry, column in enumerate(weights.T):
        if column.sum() > 0:
            merged[entry] = np.dot(column, task_vectors[:, entry]) / column.sum()
        elif masked == "average":
            merged[entry] = task_vectors[:, entry].mean()
    return merged


# A worked example: K = 2, d = 5.
#
#   v_a = 4  1 0 9  1    τ_a = 1 -2  5 1 .5     v τ² = 4 4 0 9 .25
#   v_b = 1  4 1 0 16    τ_b = 2  1 -1 3 .25    v τ² = 4 4 1 0  1
#
# Density .4 keeps two of five: 9, 4 and the other 4 of a, both 4 of b. Square roots of v weigh what is kept,
#   a: 2 1 - 3 -   b: 1 2 - - -
#   (2 + 2)/3 = 4/3   (-2 + 2)/3 = 0   0   1   0, and on average where nothing is kept: (5 - 1)/2 = 2, .75/2 = .375.
# p = 0: equal weights: 3/2, -1/2, 0, 1, 0.
# All kept, a: 2 1 0 3 1, b: 1 2 1 0 4:  4/3  0  -1  1  (.5 + 1)/5 = .3.
# Thresholds 4 for a and 4.1 for b: nothing of b: 1 -2 0 1 0.
CURVATURE = ((4.0, 1.0, 0.0, 9.0, 1.0), (1.0, 4.0, 1.0, 0.0, 16.0))
CURVED_TASK_VECTORS = ((1.0, -2.0, 5.0, 1.0, 0.5), (2.0, 1.0, -1.0, 3.0, 0.25))
OTA_MERGED = {
    "base": (4 / 3, 0, 0, 1, 0),
    "average": (4 / 3, 0, 2, 1, 0.375),
    "equal": (1.5, -0.5, 0, 1, 0),
    "all": (4 / 3, 0, -1, 1, 0.3),
    "thresholds": (1, -2, 0, 1, 0),
}
# [[1, 2], [3, 4]] from its sums: rows 3 and 7, columns 4 and 6, all 10: 12/10, 18/10, 28/10, 42/10.
RANK_ONE = ((1.2, 1.8), (2.8, 4.2))
