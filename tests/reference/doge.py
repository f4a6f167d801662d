"""DOGE (arXiv:2501.01230) a second time: numpy, the loss differentiated by hand, nothing of adamerge or torch."""

from collections.abc import Mapping

import numpy as np
from reference.descent import adam


def limits(task_vectors: Mapping[str, np.ndarray], density: float) -> list[float]:
    """By task the least magnitude kept, over all tensors (K, m, n) together: of int(density · size) + 1 entries."""
    num_tasks = len(next(iter(task_vectors.values())))
    found = []
    for task in range(num_tasks):
        magnitudes = np.sort(np.concatenate([np.abs(tensor[task]).ravel() for tensor in task_vectors.values()]))
        found.append(magnitudes[max(1, len(magnitudes) - int(density * len(magnitudes))) - 1])
    return found


def shared(task_vectors: np.ndarray, divisor: float) -> np.ndarray:
    """P, (m, q), of task vectors (K, m, n) without zeros among their singular values."""
    size = min(task_vectors.shape[1:])
    leading = [np.linalg.svd(matrix)[0][:, : size // len(task_vectors)] for matrix in task_vectors]
    return np.linalg.svd(np.concatenate(leading, axis=1))[0][:, : int(size / divisor)]


def slope(correction: np.ndarray, task_vectors: np.ndarray, factors: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """∂/∂Δ of Σ_k Σ_i e_ki², e_ki = Σ_c τ_k[i, c] (τ_k - Σ_j λ_j τ_j - (Σ_j λ_j) Δ)[i, c], outside of P.

    ∂e_ki/∂Δ[i, c] = -(Σ_j λ_j) τ_k[i, c], so it is -2 (Σ_j λ_j) Σ_k e_ki τ_k[i, c].
    """
    moved = sum(factor * matrix for factor, matrix in zip(factors, task_vectors, strict=True))
    found = np.zeros_like(correction)
    for matrix in task_vectors:
        lost = (matrix * (matrix - moved - factors.sum() * correction)).sum(1)
        found -= 2 * factors.sum() * lost[:, None] * matrix
    return found - basis @ (basis.T @ found)


def merge(
    task_vectors: Mapping[str, np.ndarray], *, eta: float, density: float, shared_divisor: float, lr: float, steps: int
) -> dict[str, np.ndarray]:
    """Merged vectors of matrices (K, m, n) by key."""
    least = limits(task_vectors, density)
    merged = {}
    for key, tensor in task_vectors.items():
        factors = np.array([eta / np.sqrt((matrix**2).sum()) for matrix in tensor])
        basis = shared(tensor, shared_divisor)
        start = np.zeros(tensor.shape[1:])
        correction = adam(lambda at, t=tensor, f=factors, b=basis: slope(at, t, f, b), start, lr, steps)
        merged[key] = sum(
            factor * (np.abs(matrix) >= limit) * (matrix + correction)
            for factor, matrix, limit in zip(factors, tensor, least, strict=True)
        )
    return merged
