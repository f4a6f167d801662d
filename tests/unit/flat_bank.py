"""Banks whose task vectors are the rows of one matrix."""

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

from adamerge.bank import ParameterBank


def bank_of(
    rows: np.ndarray, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> ParameterBank:
    """A bank whose θ₀ is zero and whose task vectors are the rows (K, d), cut into tensors in order of sorted keys.

    The tensors are stored in the order of ``shapes``.
    """
    matrix = torch.from_numpy(rows).to(dtype)
    sizes = [prod(shapes[key]) for key in sorted(shapes)]
    parts = dict(zip(sorted(shapes), matrix.split(sizes, dim=1), strict=True))
    task_vectors = {key: parts[key].reshape(len(rows), *shape).contiguous() for key, shape in shapes.items()}
    pretrained = {key: torch.zeros(shape, dtype=dtype) for key, shape in shapes.items()}
    return ParameterBank(pretrained, task_vectors, tuple(f"task{k}" for k in range(len(rows))))


def flat(task_vectors: Mapping[str, Tensor]) -> np.ndarray:
    """(K, d) in order of sorted keys."""
    return (
        torch.cat([task_vectors[key].reshape(len(task_vectors[key]), -1) for key in sorted(task_vectors)], dim=1)
        .double()
        .numpy()
    )
