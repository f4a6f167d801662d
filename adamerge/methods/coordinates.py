"""What merges that work coordinate by coordinate have in common."""

import torch
from torch import Tensor


def total(task_vectors: Tensor) -> Tensor:
    """Σ_k τ_k, (K, *shape) → (*shape), added up in float64: but for extremes, no order of the tasks rounds otherwise.

    In float32 on a device that has no float64 (mps).
    """
    return task_vectors.sum(dim=0, dtype=torch.float32 if task_vectors.device.type == "mps" else torch.float64)


def blocks(task_vectors: Tensor) -> tuple[Tensor, ...]:
    """Some coordinates of all tasks at a time, (K, n) each, in order; views where the tensor is contiguous.

    On a CPU as many as a core's cache holds with what is computed from them, several times faster than all at once.
    """
    return task_vectors.reshape(len(task_vectors), -1).split(1 << (16 if task_vectors.device.type == "cpu" else 22), 1)
