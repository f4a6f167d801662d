"""WUDI and OptMerge written down a second time (SPECS B14), from τ itself and without Gram matrices; numpy.

Also matrices worked by hand, with the derivation beside them. All give the merged vector of one matrix before scaling.
"""

from collections.abc import Sequence

import numpy as np
from reference.descent import adam, sgd
from reference.spectral import low_rank

Matrices = Sequence[np.ndarray]


def loss(merged: np.ndarray, targets: Matrices, rows: Matrices, task_vectors: Matrices) -> float:
    """Σ_k ‖(Δ - target_k) rows_kᵀ‖²/‖τ_k‖², task by task."""
    terms = zip(targets, rows, task_vectors, strict=True)
    return sum(
        float((((merged - target) @ own.T) ** 2).sum() / (vector**2).sum())
        for target, own, vector in terms
        if vector.any()
    )


def gradient(merged: np.ndarray, targets: Matrices, rows: Matrices, task_vectors: Matrices) -> np.ndarray:
    found = np.zeros_like(merged)
    for target, own, vector in zip(targets, rows, task_vectors, strict=True):
        if vector.any():
            found += 2 * ((merged - target) @ own.T) @ own / (vector**2).sum()
    return found


def wudi(task_vectors: Matrices, lr: float, steps: int) -> np.ndarray:
    return adam(lambda merged: gradient(merged, task_vectors, task_vectors, task_vectors), sum(task_vectors), lr, steps)


def wudi_minimum(task_vectors: Matrices) -> np.ndarray:
    """The minimum nearest to Στ: least squares on all conditions (Δ - Στ) τ_kᵀ/‖τ_k‖ = (τ_k - Στ) τ_kᵀ/‖τ_k‖."""
    total = sum(task_vectors)
    changed = [vector for vector in task_vectors if vector.any()]
    left = np.concatenate([vector / np.linalg.norm(vector) for vector in changed])
    right = np.concatenate([(vector - total) @ vector.T / np.linalg.norm(vector) for vector in changed], axis=1)
    return total + (np.linalg.pinv(left, rcond=1e-10) @ right.T).T


def opt_merge(
    task_vectors: Matrices, *, centered: bool, start: str, optimizer: str, lr: float, momentum: float, steps: int
) -> np.ndarray:
    rank = min(task_vectors[0].shape) // len(task_vectors)
    mean = sum(task_vectors) / len(task_vectors)
    rows = [low_rank(vector, rank) for vector in task_vectors]  # the Gram matrix of S_r V_rᵀ and of U_r S_r V_rᵀ agree
    targets = [low_rank(vector - mean, rank) + mean for vector in task_vectors] if centered else rows

    def slope(merged: np.ndarray) -> np.ndarray:
        return gradient(merged, targets, rows, task_vectors)

    first = sum(task_vectors) if start == "sum" else mean
    return (adam if optimizer == "adam" else sgd)(slope, first, lr, steps, momentum)


# WUDI by hand: τ₁ = (2, 0), τ₂ = (1, 1), single rows.
#   What each asks for: Δ·τ₁ = τ₁·τ₁, 2x = 4, and Δ·τ₂ = τ₂·τ₂, x + y = 2. Both hold at (2, 0), the minimum.
#   H = (1, 0; 0, 0) + ½ (1, 1; 1, 1) = ½ (3, 1; 1, 1), and Σ τ_k G_k/n_k = (2, 0) + (1, 1) = (3, 1): indeed
#   (2, 0) H = (3, 1). From Στ = (3, 1) the gradient is 2 ((3, 1) H - (3, 1)) = 2 ((5, 2) - (3, 1)) = (4, 2): both
#   entries fall, and Adam's first step is the learning rate for each.
#   With a ridge of ½, H becomes ½ (4, 1; 1, 2) with the inverse (2/7) (2, -1; -1, 4), and C = (2, 1):
#   (3, 1) - (2/7) (4 - 1, -2 + 4) = (15, 3)/7.
TASK_VECTORS = (((2.0, 0.0),), ((1.0, 1.0),))
GRADIENT = ((4.0, 2.0),)
MINIMUM = ((2.0, 0.0),)
RIDGE, WITH_RIDGE = 0.5, ((15 / 7, 3 / 7),)

# OptMerge by hand: τ₁ = diag(3, 1), τ₂ = diag(1, -5), so that r = 1 and τ̄ = diag(2, -2).
#   Rows: [τ₁]₁ = diag(3, 0), [τ₂]₁ = diag(0, -5). Targets about the mean: τ₁ - τ̄ = diag(1, 3), [.]₁ = diag(0, 3),
#   target diag(2, 1); τ₂ - τ̄ = diag(-1, -3), target diag(2, -5). In full: [τ₁]₁ and [τ₂]₁ themselves.
#   ‖τ₁‖² = 10, ‖τ₂‖² = 26. From the sum, diag(4, -4): gradient 2 (4 - 2)·9/10 = 3.6 and 2 (-4 + 5)·25/26 = 25/13.
#   From the mean, diag(2, -2), without centring: 2 (2 - 3)·9/10 = -1.8 and 2 (-2 + 5)·25/26 = 75/13.
OPT_TASK_VECTORS = (((3.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (0.0, -5.0)))
OPT_SUM, OPT_SUM_GRADIENT = ((4.0, 0.0), (0.0, -4.0)), ((3.6, 0.0), (0.0, 25 / 13))
OPT_MEAN, OPT_MEAN_GRADIENT = ((2.0, 0.0), (0.0, -2.0)), ((-1.8, 0.0), (0.0, 75 / 13))
