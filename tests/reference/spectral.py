"""Merges of matrices by their singular vectors, in numpy and float64, as the published code goes about them.

Every function takes the task vectors of one tensor, or of a whole model, and gives the merged vector before scaling.
They hold for matrices of full rank: below that the published code's result depends on LAPACK.
"""

from collections.abc import Mapping, Sequence
from math import cos, pi, sin, sqrt

import numpy as np

Model = Mapping[str, np.ndarray]


def polar(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv_merge(task_vectors: Sequence[np.ndarray], ranks: Sequence[int] | None = None) -> np.ndarray:
    """Columns at their places in matrices of zeros, as in the original, the polar factor taken with the zeros.

    Zero columns make that factor arbitrary there, where their singular values are zero, too.
    """
    size = min(task_vectors[0].shape)
    ranks = [size // len(task_vectors)] * len(task_vectors) if ranks is None else ranks
    stacked_left = np.zeros((task_vectors[0].shape[0], size))
    stacked_values = np.zeros(size)
    stacked_right = np.zeros((size, task_vectors[0].shape[1]))
    start = 0
    for matrix, rank in zip(task_vectors, ranks, strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        place = slice(start, start + rank)
        stacked_left[:, place], stacked_right[place] = left[:, :rank], right[:rank]
        stacked_values[place] = values[:rank]
        start += rank
    return polar(stacked_left) @ np.diag(stacked_values) @ polar(stacked_right)


def reweighted_tsv_merge(
    task_vectors: Sequence[np.ndarray], deviations: float, weight: float, negligible: float
) -> np.ndarray:
    """Entry by entry."""
    weighted, counts = [], []
    for matrix in task_vectors:
        entries = [abs(entry) for entry in matrix.flat]
        mean = sum(entries) / len(entries)
        deviation = sqrt(sum((entry - mean) ** 2 for entry in entries) / len(entries))
        limit = mean + deviations * deviation
        new = [weight * entry if abs(entry) > limit else entry for entry in matrix.flat]
        weighted.append(np.array(new).reshape(matrix.shape))
        counts.append(sum(entry > negligible * mean for entry in entries))
    size = min(task_vectors[0].shape)
    return tsv_merge(weighted, [size * count // sum(counts) for count in counts])


def iso_c(task_vectors: Sequence[np.ndarray]) -> np.ndarray:
    left, values, right = np.linalg.svd(sum(task_vectors), full_matrices=False)
    return left @ np.diag(np.full(len(values), values.mean())) @ right


def iso_cts(task_vectors: Sequence[np.ndarray], common_fraction: float) -> np.ndarray:
    num_tasks, size = len(task_vectors), min(task_vectors[0].shape)
    specific = round((size - int(size * common_fraction)) / num_tasks) * num_tasks
    common = size - specific
    left, values, right = np.linalg.svd(sum(task_vectors), full_matrices=False)
    shared = left[:, :common]
    lefts, all_values, rights = [shared], [values[:common]], [right[:common]]
    for matrix in task_vectors:
        rest = (np.eye(len(matrix)) - shared @ shared.T) @ matrix
        left, values, right = np.linalg.svd(rest, full_matrices=False)
        own = specific // num_tasks
        lefts.append(left[:, :own])
        all_values.append(values[:own])
        rights.append(right[:own])
    mean = np.concatenate(all_values).mean()
    return mean * polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights))


def opcm(models: Sequence[Model], alpha: float, linear: Sequence[str]) -> tuple[dict[str, np.ndarray], list[float]]:
    """Whole models one after another, scaled after each; also λ_1, λ_2, …"""

    def norm(model: Model) -> float:
        return sqrt(sum(float((tensor**2).sum()) for tensor in model.values()))

    merged, scales, norms = dict(models[0]), [1.0], [norm(models[0])]
    for model in models[1:]:
        norms.append(norm(model))
        following = {}
        for key, before in merged.items():
            cleaned = model[key]
            if key in linear:
                left, values, right = np.linalg.svd(before, full_matrices=True)
                shares = np.cumsum(values) / values.sum()
                leading = int(np.argmax(shares > alpha))
                inner = left.T @ model[key] @ right.T
                np.fill_diagonal(inner, 0)
                inner[:leading, :leading] = 0
                cleaned = left @ inner @ right
            following[key] = scales[-1] * before + cleaned
        mean = sum(norms) / len(norms)
        scales.append(norm(following) / mean)
        merged = {key: tensor / scales[-1] for key, tensor in following.items()}
    return merged, scales


def low_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return sum((values[i] * np.outer(left[:, i], right[i]) for i in range(rank)), np.zeros_like(matrix))


# TSV-Merge by hand: K = 2 tasks, 2 x 2, so q = 1.
#
#   τ₁ = diag(4, 1): leading triplet e₁, 4, e₁.
#   τ₂ = 5 (.6, .8)ᵀ e₂ᵀ + 1 (-.8, .6)ᵀ e₁ᵀ: leading triplet (.6, .8), 5, e₂.
#   U = [[1, .6], [0, .8]], V = I. The rotation nearest to [[a, b], [c, d]] of positive determinant is
#   [[a + d, b - c], [c - b, a + d]] over the root of (a + d)² + (b - c)²; here (1.8, .6; -.6, 1.8)/√3.6 =
#   (3, 1; -1, 3)/√10: both columns turned by the same angle, until they are at a right one.
#   Δ = U⊥ diag(4, 5).
TSV_TASK_VECTORS = (((4.0, 0.0), (0.0, 1.0)), ((-0.8, 3.0), (0.6, 4.0)))
TSV_MERGED = ((12 / sqrt(10), 5 / sqrt(10)), (-4 / sqrt(10), 15 / sqrt(10)))

# R-TSVM by hand: K = 2 tasks, 3 x 3, outlier_deviations 1, outlier_weight .5, negligible .5.
#
#   τ₁ = diag(8, 2, 2): magnitudes of mean 12/9 = 1.33 and variance 72/9 - 1.33² = 6.22, so that 8 lies above
#   1.33 + 2.49 and becomes 4. Three entries are above .67.
#   τ₂: two rows of ones, one of them with a minus: mean 6/9 and variance 6/9 - 36/81 = 2/9; 1 lies below .67 + .47 and
#   stays. Six entries are above .33. The ranks are ⌊3 · 3/9⌋ = 1 and ⌊3 · 6/9⌋ = 2 (TSV-Merge's would be 1 and 1).
#   Triplets: e₁, 4, e₁ of task 1; and of task 2, whose rows r and r' have rr = r'r' = 3 and rr' = 1: from their sum
#   (e₂ + e₃)/√2, √(3 + 1) = 2, (1, 1, 0)/√2, and from their difference (e₂ - e₃)/√2, √(3 - 1), e₃.
#   U is orthogonal. Of V's columns two are 45° apart: both are turned by 22.5°, away from each other, to
#   (c, -s, 0) and (s, c, 0) with c and s the cosine and sine of π/8.
#   Δ = 4 e₁ (c, -s, 0) + √2 (e₂ + e₃) (s, c, 0) + (e₂ - e₃) e₃ᵀ.
R_TSVM_TASK_VECTORS = (
    ((8.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 2.0)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, -1.0)),
)
R_TSVM_OPTIONS = (1.0, 0.5, 0.5)
R_TSVM_MERGED = (
    (4 * cos(pi / 8), -4 * sin(pi / 8), 0.0),
    (sqrt(2) * sin(pi / 8), sqrt(2) * cos(pi / 8), 1.0),
    (sqrt(2) * sin(pi / 8), sqrt(2) * cos(pi / 8), -1.0),
)

# Low rank by hand: the larger triplet of τ₂ of TSV-Merge above, (.6, .8), 5, e₂; its Σσ² is 26, of which 25 are kept.
LOW_RANK_MATRIX = TSV_TASK_VECTORS[1]
LOW_RANK_KEPT = ((0.0, 3.0), (0.0, 4.0))

# Iso-C by hand: Στ = [[1, .6], [0, .8]], with U Vᵀ = (3, 1; -1, 3)/√10 from above. For a positive determinant
# (σ₁ + σ₂)² = ‖·‖² + 2 det = 1 + .36 + .64 + 1.6 = 3.6, so that σ̄ = √3.6/2 and σ̄ U Vᵀ = .3 (3, 1; -1, 3).
ISO_TASK_VECTORS = (((1.0, 1.0), (0.5, 0.0)), ((0.0, -0.4), (-0.5, 0.8)))
ISO_MERGED = ((0.9, 0.3), (-0.3, 0.9))

# Iso-CTS by hand: K = 2 tasks, diagonal 4 x 4, common_fraction .5: two common directions and one for each task.
#   Σ = diag(6, 4, .8, .6): common e₁ and e₂ with 6 and 4. What is left of task 1 is diag(0, 0, 1, .1), of which it
#   keeps e₃ with its own 1 (not the sum's .8); of task 2 diag(0, 0, -.2, .5): e₄ with .5. They are orthogonal already:
#   (6 + 4 + 1 + .5)/4 = 2.875 times the identity, where Iso-C gives (6 + 4 + .8 + .6)/4 = 2.85.
ISO_CTS_DIAGONALS = ((3.0, 2.0, 1.0, 0.1), (3.0, 2.0, -0.2, 0.5))
ISO_CTS_VALUE = 2.875

# OPCM by hand: τ₁ = diag(4, 3, 1), so that U = V = I and the shares of σ add up to .5, .875, 1.
#   τ₂ = 1 … 9. With α = .6 one share is below it, r = 1, and only the diagonal goes (the block is part of it);
#   with α = .9 r = 2: the upper left 2 x 2 goes, too. The bias is summed: 2 + 1.
#   α = .6: the sum is [[4, 2, 3], [4, 3, 6], [7, 8, 1]] and 3, squares 16 + 4 + 9 + 16 + 9 + 36 + 49 + 64 + 1 + 9 =
#   213.
#   α = .9: [[4, 0, 3], [0, 3, 6], [7, 8, 1]] and 3, squares 16 + 9 + 9 + 36 + 49 + 64 + 1 + 9 = 193.
#   ‖τ₁‖² = 16 + 9 + 1 + 4 = 30, ‖τ₂‖² = 285 + 1 = 286: the norm becomes (√30 + √286)/2.
OPCM_TASK_VECTORS = (
    {"weight": ((4.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 1.0)), "bias": (2.0,)},
    {"weight": ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (7.0, 8.0, 9.0)), "bias": (1.0,)},
)
OPCM_SUMS = {
    0.6: {"weight": ((4.0, 2.0, 3.0), (4.0, 3.0, 6.0), (7.0, 8.0, 1.0)), "bias": (3.0,)},
    0.9: {"weight": ((4.0, 0.0, 3.0), (0.0, 3.0, 6.0), (7.0, 8.0, 1.0)), "bias": (3.0,)},
}
OPCM_FACTORS = {0.6: (sqrt(30) + sqrt(286)) / 2 / sqrt(213), 0.9: (sqrt(30) + sqrt(286)) / 2 / sqrt(193)}
