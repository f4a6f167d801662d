"""Self Positioning's merged task vector, on the task vectors themselves: numpy, and nothing of adamerge.

Rule (SPECS A6): V = τ_1; for i = 2 … K, with β = a_i / (a_i + mean(a_1 … a_{i-1})) and α the angle between V and τ_i,
V ← [sin((1 - β) α) V + sin(β α) τ_i] / sin α; then s · V. Where sin α vanishes, or a vector, V ← (1 - β) V + β τ_i.
"""

import numpy as np


def slerp(start: np.ndarray, end: np.ndarray, fraction: float) -> np.ndarray:
    """From ``start`` (n,) a ``fraction`` of the angle towards ``end`` (n,); lengths need not be 1."""
    lengths = np.linalg.norm(start) * np.linalg.norm(end)
    if lengths > 0:
        angle = np.arccos(np.clip(start @ end / lengths, -1, 1))
        if np.sin(angle) > 1e-6:
            return (np.sin((1 - fraction) * angle) * start + np.sin(fraction * angle) * end) / np.sin(angle)
    return (1 - fraction) * start + fraction * end


def joined(task_vectors: np.ndarray, weights: np.ndarray, norm: float) -> np.ndarray:
    """s · V, (n,).

    Args:
        task_vectors: (K, n), flattened.
        weights: a, (K,), above 0.
        norm: s.
    """
    vector = task_vectors[0]
    for i in range(1, len(task_vectors)):
        before = weights[:i].mean()
        vector = slerp(vector, task_vectors[i], weights[i] / (weights[i] + before))
    return norm * vector
