"""Iterated SLERP, Self Positioning's merged task vector, on the vectors themselves: numpy, nothing of adamerge.

Rule (SPECS A6): V = τ_1; for i = 2 … K, with β = a_i / (a_i + mean(a_1 … a_{i-1})) and α the angle between V and τ_i,
V ← [sin((1 - β) α) V + sin(β α) τ_i] / sin α; then s · V. Where sin α vanishes, or a vector, V ← (1 - β) V + β τ_i.
mergekit and FusionBench join two models so, with β = t, and go straight above a cosine of 0.9995.
"""

import numpy as np


def slerp(start: np.ndarray, end: np.ndarray, fraction: float, parallel: float = 1 - 1e-12) -> np.ndarray:
    """From ``start`` (n,) a ``fraction`` of the angle towards ``end`` (n,); lengths need not be 1.

    Beyond a cosine of ``parallel``, of either sign, on the straight line.
    """
    lengths = np.linalg.norm(start) * np.linalg.norm(end)
    if lengths > 0:
        cosine = np.clip(start @ end / lengths, -1, 1)
        angle = np.arccos(cosine)
        if abs(cosine) <= parallel:
            return (np.sin((1 - fraction) * angle) * start + np.sin(fraction * angle) * end) / np.sin(angle)
    return (1 - fraction) * start + fraction * end


def joined(
    task_vectors: np.ndarray,
    weights: np.ndarray,
    norm: float = 1.0,
    *,
    against: str = "mean",
    parallel: float = 1 - 1e-12,
) -> np.ndarray:
    """s · V, (n,).

    Args:
        task_vectors: (K, n), flattened.
        weights: a, (K,), above 0.
        norm: s.
        against: ``mean`` or ``sum``: what of a_1 … a_{i-1} stands beside a_i in β.
        parallel: As ``slerp`` takes it.
    """
    vector = task_vectors[0]
    for i in range(1, len(task_vectors)):
        before = weights[:i].mean() if against == "mean" else weights[:i].sum()
        vector = slerp(vector, task_vectors[i], weights[i] / (weights[i] + before), parallel)
    return norm * vector
