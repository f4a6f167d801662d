"""Inner products of θ₀ and the task vectors, tensor by tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.bank.storage import Rows
from adamerge.errors import ConfigError
from adamerge.merging import Partition
from adamerge.merging.partition import Segments

_BLOCK = 1 << 16
"""Entries that are widened at a time."""


@torch.no_grad()
def gram_matrices(bank: ParameterBank) -> Tensor:
    """⟨u, v⟩ for u, v ∈ {θ₀, τ_1, …, τ_K}, per tensor, in the order of the bank.

    Reads τ once, a few entries of one tensor at a time.

    Returns:
        (L, 1 + K, 1 + K), added up in float64, on the bank's device.
    """
    return torch.stack([_gram(base, Rows.of(bank.task_vectors, key)) for key, base in bank.pretrained.items()])


def _gram(base: Tensor, task_vectors: Rows) -> Tensor:
    device, flat = base.device, base.reshape(-1)
    wide = torch.float32 if device.type == "mps" else torch.float64
    size = 1 + len(task_vectors.values)
    total = torch.zeros(size, size, dtype=wide, device=device)
    for part, values in task_vectors.widened(wide, _BLOCK):
        vectors = torch.cat([flat[None, part].to(wide), values.to(device)])  # (1 + K, run)
        total += vectors @ vectors.T
    return total


def tensor_groups(partition: Partition, keys: Sequence[str]) -> list[int]:
    """The group of every tensor.

    Raises:
        ConfigError: If a tensor is divided among several groups.
    """
    runs = [partition.segments.get(key, Segments(())) for key in keys]
    if any(len(of_tensor) != 1 for of_tensor in runs):
        raise ConfigError(
            f"granularity '{partition.granularity}' divides tensors, which this rule takes whole. "
            "Use method.granularity=task, block or tensor."
        )
    return [of_tensor[0][2] for of_tensor in runs]
