"""Which tensors are matrices, their singular value decompositions, and what follows from them."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from adamerge.errors import CheckpointError, ConfigError

_PACKED = ("in_proj_weight", "qkv.weight")
"""Endings of keys whose tensor stacks the projections of queries, keys and values."""


def blocks_of(key: str, stacked: Tensor, *, exclude: Sequence[str], split_in_proj: bool) -> tuple[Tensor, ...]:
    """The matrices that a tensor holds, as views; none where it is not one.

    Args:
        key: The tensor's.
        stacked: (K, *shape). Two-dimensional tensors are matrices: in a CLIP-ViT the positional embedding and the
            projection, too. Convolutions are not.
        exclude: Shell patterns of keys that are not to be taken for matrices.
        split_in_proj: Whether packed projections of queries, keys and values (3n x n) are three matrices.

    Returns:
        One or three (K, m, n), which put below each other are the tensor.
    """
    if stacked.dim() != 3 or any(fnmatchcase(key, pattern) for pattern in exclude):
        return ()
    rows, columns = stacked.shape[1:]
    if split_in_proj and key.endswith(_PACKED) and rows == 3 * columns:
        return stacked.split(columns, dim=1)
    return (stacked,)


def check_patterns(exclude: Sequence[str], keys: Iterable[str]) -> None:
    """Refuse patterns that match nothing.

    Raises:
        ConfigError: If one matches none of the keys.
    """
    keys = tuple(keys)
    for pattern in exclude:
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise ConfigError(
                f"the pattern '{pattern}' of exclude matches none of the {len(keys)} merged tensors. "
                f"They look like '{keys[0] if keys else 'visual.…'}'; leave the pattern out or correct it."
            )


def svd(matrices: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of a stack, or its leading part.

    In float32 it is worked out from the eigenvectors of the smaller Gram matrix in float64, one matrix after another.
    That is faster than LAPACK's SVD in float32 where the matrix is long or few vectors are wanted, and closer to the
    exact one: with singular values down to 1e-5 of the largest U Vᵀ is right to 3e-7, where LAPACK's is to 1e-3.
    In float64, where squaring would cost half of the digits, it is LAPACK's.

    Args:
        matrices: (…, m, n), float32 or float64.
        rank: How many of the largest singular values are wanted; all by default.

    Returns:
        U (…, m, r), S (…, r) falling, V transposed (…, r, n), r = min(m, n) or ``rank`` if that is less. U and V have
        orthonormal columns also where singular values are zero.

    Raises:
        CheckpointError: If a matrix holds NaN or Inf.
    """
    *batch, rows, columns = matrices.shape
    kept = min(rows, columns) if rank is None else min(rows, columns, rank)
    parts = [_svd(matrix, kept) for matrix in matrices.reshape(prod(batch), rows, columns)]
    left, values, right = (torch.stack(part) for part in zip(*parts, strict=True))
    return left.view(*batch, rows, kept), values.view(*batch, kept), right.view(*batch, kept, columns)


def nonzero(values: Tensor) -> Tensor:
    """Which singular values (…, r), falling, are more than rounding: above 16 units of rounding of the largest."""
    return values > 16 * torch.finfo(values.dtype).eps * values[..., :1]


def polar_factor(matrices: Tensor) -> Tensor:
    """U Vᵀ over the singular values that are not zero, (…, m, n).

    Of a matrix of full rank it is the nearest one with orthonormal columns (or rows, where there are more columns).
    Below that U Vᵀ would hold directions of LAPACK's choosing; they are left out, and a zero matrix gives zero.

    Args:
        matrices: (…, m, n), float32 or float64.
    """
    left, values, right = svd(matrices)
    return (left * nonzero(values).unsqueeze(-2)) @ right


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading part of one matrix's decomposition."""
    if rank == 0:
        return matrix[:, :0], matrix.new_zeros(0), matrix[:0]
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _svd(matrix.mT, rank)
        return right.mT, values, left.mT
    if matrix.device.type == "mps":  # which has neither float64 nor these decompositions
        left, values, right = _svd(matrix.cpu(), rank)
        return left.to(matrix.device), values.to(matrix.device), right.to(matrix.device)
    if not matrix.isfinite().all():
        raise CheckpointError("a matrix to be decomposed holds NaN or Inf. Look at the experts and at the transform.")
    if matrix.dtype == torch.float64:
        try:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  # did not converge, which eigenvalues always do
            return _by_gram(matrix, rank, clean=1)
        return left[:, :rank], values[:rank], right[:rank]
    left, values, right = _by_gram(matrix.double(), rank, clean=1e-5)
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)


def _by_gram(matrix: Tensor, rank: int, clean: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same from AᵀA = V S² Vᵀ and A V = U S.

    Args:
        matrix: float64, no more columns than rows.
        rank: At least 1.
        clean: How small singular values may be beside the largest before U is orthogonalised once more: its columns
            come out orthogonal to about 2e-17 over the square of that.
    """
    right = torch.linalg.eigh(_lower_gram(matrix)).eigenvectors.flip(1)[:, :rank]
    scaled = matrix @ right
    values = torch.linalg.vector_norm(scaled, dim=0)
    if values.min() > clean * values[0]:
        return scaled / values, values, right.mT
    left, triangle = torch.linalg.qr(scaled)
    return left * torch.where(triangle.diagonal() < 0, -1.0, 1.0), values, right.mT


def _lower_gram(matrix: Tensor) -> Tensor:
    """AᵀA on and below the diagonal, the part that eigh reads, in five eighths of the work; (n, n)."""
    size = matrix.shape[1]
    gram = matrix.new_zeros(size, size)
    bounds = [size * piece // 4 for piece in range(5)]
    for start, stop in pairwise(bounds):
        torch.mm(matrix[:, start:stop].mT, matrix[:, :stop], out=gram[start:stop, :stop])
    return gram
