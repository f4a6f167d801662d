"""TIES merging written down a second time (SPECS B3), by sorting; numpy, nothing of adamerge.

Also a matrix that is worked out by hand, with the derivation beside it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

TaskVectors = Mapping[str, np.ndarray]


def flatten(task_vectors: TaskVectors) -> np.ndarray:
    """One row (d,): all tensors, keys sorted, each flattened row by row."""
    return np.concatenate([np.asarray(task_vectors[key], dtype=np.float64).ravel() for key in sorted(task_vectors)])


def trim(rows: np.ndarray, density: float) -> np.ndarray:
    """Keep |entry| ≥ t_k, the (d − ⌊density·d⌋)-th smallest of row k; (K, d). A density above 1 is a percentage."""
    density = density / 100 if density > 1 else density
    size = rows.shape[1]
    rank = size - int(density * size)  # 1 = the smallest
    if rank == 0:
        return rows.copy()
    thresholds = np.sort(np.abs(rows), axis=1)[:, rank - 1 : rank]  # (K, 1)
    return np.where(np.abs(rows) >= thresholds, rows, 0.0)


def elect(trimmed: np.ndarray) -> np.ndarray:
    """Sign of the summed mass per coordinate, (d,); an undecided one follows the majority of coordinates."""
    signs = np.sign(trimmed.sum(axis=0))
    return np.where(signs == 0, np.sign(signs.sum()), signs)


def select(trimmed: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Entries that agree with the elected sign, (K, d): the task vectors of AdaMerging++."""
    return np.where(np.sign(trimmed) == signs, trimmed, 0.0)


def aggregate(selected: np.ndarray, how: str) -> np.ndarray:
    """``sum``, ``mean`` over the tasks that have a say, or ``max`` by magnitude; (d,)."""
    if how == "sum":
        return selected.sum(axis=0)
    if how == "mean":
        return selected.sum(axis=0) / np.maximum((selected != 0).sum(axis=0), 1)
    largest = np.abs(selected).argmax(axis=0)
    return selected[largest, np.arange(selected.shape[1])]


def ties(experts: Sequence[TaskVectors], density: float, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Surviving task vectors (K, d) and the merged one (d,)."""
    rows = np.stack([flatten(expert) for expert in experts])
    trimmed = trim(rows, density)
    selected = select(trimmed, elect(trimmed))
    return selected, aggregate(selected, how)


# A worked example: K = 3 tasks, d = 10 entries in two tensors, density 20 %.
#
#   "a.bias" (4,) is coordinates 0-3, "b.weight" (2, 3) is coordinates 4-9: sorted keys; stored in the other order.
#
#                0     1     2     3  |  4     5     6     7     8     9
#   task 0       5     1    -4     0    0.5   -3     2     0   0.25   -1
#   task 1      -5     2     2    -2     0     2    0.5    0     1     3
#   task 2       0     0     6    -1     0     0     0     0     0     0
#
# Trim. ⌊0.2·10⌋ = 2, so t_k is the 8th smallest magnitude of the row.
#   task 0: 0 0 .25 .5 1 1 2 |3| 4 5   t = 3, kept: 5, -4, -3            3 entries = ⌊Kd⌋ + 1
#   task 1: 0 0 .5 1 2 2 2 |2| 3 5     t = 2, kept: -5, 2, 2, -2, 2, 3   3 entries + 3 that tie with t
#   task 2: 0 0 0 0 0 0 0 |0| 1 6      t = 0, kept: everything, so 6 and also the small -1
# (Thresholds per tensor would keep task 0's 2 at coordinate 6: in b.weight ⌊0.2·6⌋ = 1, the 5th smallest of
# 0 .25 .5 1 2 3 is 2.)
#
# Elect. Sums of what is kept: 0 (5 - 5, an exact cancellation), 2, -4+2+6 = 4, -3, 0, -3+2 = -1, 0, 0, 0, 3.
#   Signs 0 + + - 0 - 0 0 0 +; they add up to 3 - 2 = 1, so the majority is + and takes the zeros: + + + - + - + + + +.
#   (By a vote, or without the replacement, coordinate 0 would be empty.)
#
# Disjoint merge. Coordinate 0: 5 agrees, -5 does not. 1: 2. 2: 2 and 6 agree, -4 does not. 3: -2 and -1. 5: -3, not 2.
#   9: 3.
WORKED_TASK_VECTORS = (
    {
        "b.weight": np.array([[0.5, -3.0, 2.0], [0.0, 0.25, -1.0]]),
        "a.bias": np.array([5.0, 1.0, -4.0, 0.0]),
    },
    {
        "b.weight": np.array([[0.0, 2.0, 0.5], [0.0, 1.0, 3.0]]),
        "a.bias": np.array([-5.0, 2.0, 2.0, -2.0]),
    },
    {
        "b.weight": np.zeros((2, 3)),
        "a.bias": np.array([0.0, 0.0, 6.0, -1.0]),
    },
)
WORKED_DENSITY = 0.2
WORKED_KEPT = (3, 6, 10)
WORKED_THRESHOLDS = (3.0, 2.0, 0.0)
WORKED_SIGNS = (1, 1, 1, -1, 1, -1, 1, 1, 1, 1)
WORKED_SELECTED = (
    (5, 0, 0, 0, 0, -3, 0, 0, 0, 0),
    (0, 2, 2, -2, 0, 0, 0, 0, 0, 3),
    (0, 0, 6, -1, 0, 0, 0, 0, 0, 0),
)
WORKED_MERGED = {
    "sum": (5, 2, 8, -3, 0, -3, 0, 0, 0, 3),
    "mean": (5, 2, 4, -1.5, 0, -3, 0, 0, 0, 3),
    "max": (5, 2, 6, -2, 0, -3, 0, 0, 0, 3),
}
