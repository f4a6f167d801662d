"""PCB-Merging written down a second time (SPECS B6), over one flat matrix and by sorting; numpy, nothing of adamerge.

Also a matrix that is worked out by hand, with the derivation beside it.
"""

import numpy as np


def unit(values: np.ndarray) -> np.ndarray:
    """Each row brought to [0, 1] by its minimum and maximum; zeros where they are equal."""
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    return np.divide(values - low, high - low, out=np.zeros_like(values), where=high > low)


def pcb(rows: np.ndarray, density: float, clip: float, agreement: str, zeros: int = 0) -> np.ndarray:
    """The merged vector (d,) before scaling, of task vectors (K, d)."""
    rows = np.hstack([rows, np.zeros((len(rows), zeros))])
    num_tasks, size = rows.shape
    ordered = np.sort(np.abs(rows), axis=1)
    first = int(size * clip)
    last = max(first, int(size * (1 - clip) - 1))
    magnitudes = np.clip(np.abs(rows), ordered[:, first, None], ordered[:, last, None])
    signed = np.sign(rows) * unit(magnitudes)
    intra = np.exp(num_tasks * unit(magnitudes) ** 2)
    if agreement == "pairwise":
        inter = np.stack([sum(np.tanh(one * other) for other in signed) for one in signed])
    else:
        inter = np.tanh(rows * (signed if agreement == "normalized" else rows).sum(axis=0))
    scores = intra * inter
    threshold = np.sort(scores, axis=1)[:, int(size * (1 - density)), None]
    weights = unit(np.maximum(scores, threshold))
    merged = (weights * np.sign(rows) * magnitudes).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-12)
    return merged[: size - zeros]


# A worked example: K = 2 tasks, four coordinates, density 0.75, no clipping, ``normalized``.
#
#                       0        1        2        3
#   task 0              4       -2        0        1
#   task 1              2        2       -1        0
#   n, task 0           1       1/2       0       1/4          (magnitudes from 0 to 4)
#   n, task 1           1        1       1/2       0           (from 0 to 2)
#   Σ sign n            2       1/2     -1/2      1/4
#   τ Σ, task 0         8       -1        0       1/4
#   τ Σ, task 1         4        1       1/2       0
#   b, task 0    e² tanh 8   < 0          0   e^(1/8) tanh(1/4)
#   b, task 1    e² tanh 4  e² tanh 1  e^(1/2) tanh(1/2)  0
#
# ⌊4·0.25⌋ = 1: the threshold is the second smallest score, 0 for task 0 and that of coordinate 2 for task 1; neither
# entry at the threshold counts, nor what is below. So coordinate 0 is both tasks', each with weight 1, the largest:
# (4 + 2) / 2. Coordinate 1 is task 1's alone, whole: its weight, (7.3891·0.7616 - 1.6487·0.4621) / (7.3841 - 0.7619) =
# 0.73, cancels. Coordinate 3 is task 0's alone, and 2 is nobody's.
WORKED = ((4.0, -2.0, 0.0, 1.0), (2.0, 2.0, -1.0, 0.0))
WORKED_MERGED = (3.0, 2.0, 0.0, 1.0)
# Of coordinate 0 task 0 gives 4/2 and task 1 2/2; what is one task's alone is all its own.
WORKED_SHARES = ((2.0, 0.0, 0.0, 1.0), (1.0, 2.0, 0.0, 0.0))
# With density 0.5 the thresholds are those of coordinate 3 and coordinate 1: only coordinate 0 is left.
WORKED_HALF = (3.0, 0.0, 0.0, 0.0)
