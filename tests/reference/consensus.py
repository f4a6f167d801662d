"""TALL masks and Consensus merging written down a second time (SPECS B8); numpy, nothing of adamerge.

Also a matrix that is worked out by hand, with the derivation beside it.
"""

from collections.abc import Sequence

import numpy as np


def tall_masks(rows: np.ndarray, multi_task: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """m_t = 1[|τ_t| > λ_t |τ_MTL - τ_t|]: (K, d), (d,), K numbers → bool (K, d)."""
    return np.abs(rows) > np.asarray(thresholds)[:, None] * np.abs(multi_task - rows)


def consensus(rows: np.ndarray, multi_task: np.ndarray, thresholds: Sequence[float], agreement: int) -> np.ndarray:
    """τ_MTL where at least ``agreement`` tasks claim it, (d,)."""
    return np.where(tall_masks(rows, multi_task, thresholds).sum(axis=0) >= agreement, multi_task, 0.0)


# A worked example: K = 3 tasks, five coordinates, λ = 1/2 for all.
#
#                  0     1     2     3     4
#   task 0         4     1     0     2    -3
#   task 1         4    -2     0     0    -3
#   task 2        -1     1     5     0     0
#   τ_MTL          7     0     5     2    -6
#
#   |τ_MTL - τ|/2, and whether |τ| exceeds it:
#   task 0       1.5 y 0.5 y 2.5 n  0  y 1.5 y
#   task 1       1.5 y  1  y 2.5 n  1  n 1.5 y
#   task 2        4  n 0.5 y  0  y  1  n  3  n
#   claims         2     3     1     1     2
#
# With λ = 1 the right-hand sides double: task 0 keeps 0 (4 > 3) and 3 (2 > 0), not 1 and 4, where it is level (1 > 1,
# 3 > 3); task 1 keeps 0 alone (4 > 3; 2 > 2 is not); task 2 keeps 2 (5 > 0; 1 > 1 is not). Claims 2 0 1 1 0.
WORKED = ((4.0, 1.0, 0.0, 2.0, -3.0), (4.0, -2.0, 0.0, 0.0, -3.0), (-1.0, 1.0, 5.0, 0.0, 0.0))
WORKED_TALL = ((7.0, 0.0, 0.0, 2.0, -6.0), (7.0, 0.0, 0.0, 0.0, -6.0), (0.0, 0.0, 5.0, 0.0, 0.0))
WORKED_MERGED = {
    (0.5, 1): (7.0, 0.0, 5.0, 2.0, -6.0),
    (0.5, 2): (7.0, 0.0, 0.0, 0.0, -6.0),
    (0.5, 3): (0.0, 0.0, 0.0, 0.0, 0.0),
    (1.0, 1): (7.0, 0.0, 5.0, 2.0, 0.0),
    (1.0, 2): (7.0, 0.0, 0.0, 0.0, 0.0),
}
"""By λ and the number of tasks that must agree; coordinate 1 sums to zero whoever claims it."""
