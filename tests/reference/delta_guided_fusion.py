"""Delta-guided fusion written down a second time (SPECS B22), entry by entry; numpy, nothing of adamerge."""

import numpy as np


def merged(task_vectors: np.ndarray, exponent: float, granularity: str) -> np.ndarray:
    """Σ_k w_k τ_k of (K, *shape)."""
    found = np.zeros(task_vectors.shape[1:])
    norms = [float(np.sqrt((task_vector**2).sum())) for task_vector in task_vectors]
    for place in np.ndindex(found.shape):
        entries = [float(task_vector[place]) for task_vector in task_vectors]
        sizes = norms if granularity == "tensor" else [abs(entry) for entry in entries]
        total = sum(size**exponent for size in sizes)
        if total:
            found[place] = sum(size**exponent * entry for size, entry in zip(sizes, entries, strict=True)) / total
    return found


# A worked example: τ₁ = (3, 0, -4) of norm 5, τ₂ = (1, 0, 0) of norm 1; p = 1.
#   By entry: 3·3/4 + 1·1/4 = 5/2; nothing moved; -4 alone.
#   By tensor, weights 5/6 and 1/6: 15/6 + 1/6 = 8/3; 0; -20/6 = -10/3.
WORKED_TASK_VECTORS = ((3.0, 0.0, -4.0), (1.0, 0.0, 0.0))
WORKED_MERGED = {"entry": (2.5, 0.0, -4.0), "tensor": (8 / 3, 0.0, -10 / 3)}
