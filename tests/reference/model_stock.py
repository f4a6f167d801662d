"""Model Stock written down a second time, pair by pair; numpy, nothing of adamerge."""

from itertools import combinations

import numpy as np


def ratio(task_vectors: np.ndarray, average: str = "cosine") -> float:
    """t of K vectors (K, n)."""
    cosines = []
    for i, j in combinations(range(len(task_vectors)), 2):
        lengths = np.linalg.norm(task_vectors[i]) * np.linalg.norm(task_vectors[j])
        cosines.append(float(task_vectors[i] @ task_vectors[j] / lengths) if lengths else 0.0)
    cosine = (
        float(np.cos(np.mean(np.arccos(np.clip(cosines, -1, 1))))) if average == "angle" else float(np.mean(cosines))
    )
    count = len(task_vectors)
    return count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0


def merged(pretrained: np.ndarray, experts: np.ndarray, average: str = "cosine", by_row: bool = False) -> np.ndarray:
    """t · mean + (1 - t) · θ₀ of θ₀ (*shape) and experts (K, *shape), as a whole or row by row."""
    if by_row and pretrained.ndim > 1:
        rows = [merged(pretrained[i], experts[:, i], average) for i in range(len(pretrained))]
        return np.stack(rows)
    t = ratio((experts - pretrained).reshape(len(experts), -1), average)
    return t * experts.mean(0) + (1 - t) * pretrained


# A worked example: θ₀ = (1, 1, 1), τ₁ = (3, 0, 4), τ₂ = (0, 0, 5), of length 5 each.
#   c = 20 / 25 = 4/5, t = 2·4/5 / (1 + 4/5) = 8/9.
#   Mean of the τ: (3/2, 0, 9/2); times 8/9: (4/3, 0, 4).
WORKED_PRETRAINED = (1.0, 1.0, 1.0)
WORKED_TASK_VECTORS = ((3.0, 0.0, 4.0), (0.0, 0.0, 5.0))
WORKED_MERGED = (7 / 3, 1.0, 5.0)
