"""Singular value decompositions and what follows from them, for stacks of matrices."""

import torch
from torch import Tensor


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of a stack.

    Args:
        matrices: (…, m, n), float32 or float64.

    Returns:
        U (…, m, r), S (…, r) falling, V transposed (…, r, n), r = min(m, n).
    """
    return torch.linalg.svd(matrices, full_matrices=False)


def polar_factor(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal columns (or rows, where there are more columns): U Vᵀ, (…, m, n)."""
    left, _, right = svd(matrices)
    return left @ right
