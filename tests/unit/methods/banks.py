"""Banks and merges of task vectors that a test writes down."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adamerge.bank import ParameterBank


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float32, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank_of(task_vectors: Mapping[str, Tensor]) -> ParameterBank:
    """θ₀ = 0 and the given τ, (K, *shape) by key; tasks are called a, b, c, …"""
    tensors = {key: tensor.contiguous() for key, tensor in task_vectors.items()}
    names = tuple("abcdefgh"[: len(next(iter(tensors.values())))])
    return ParameterBank({key: torch.zeros_like(tensor[0]) for key, tensor in tensors.items()}, tensors, names)


def vector_of(method: Any, bank: ParameterBank) -> dict[str, Tensor]:
    """What a static merge adds to θ₀ = 0; it must leave the bank as it was."""
    before = {key: tensor.clone() for key, tensor in bank.task_vectors.items()}
    merged = method(bank)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bank.task_vectors.items())
    assert all(tensor.isfinite().all() for tensor in merged.values())
    return merged
